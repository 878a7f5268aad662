// What was sent to a device lately, so that the same bytes are not sent again.
#pragma once

#include <cstddef>
#include <cstring>
#include <list>
#include <utility>
#include <vector>

namespace adahessian {

// Memory: owns the bytes on the device.
template <class Memory>
class UploadCache {
 public:
  static constexpr size_t kEntries = 16;  // more than a training step has tables

  // The memory that holds these bytes. Where none does, send() makes some, in place of what was not asked for longest.
  template <class Send>
  const Memory& find(const void* bytes, size_t size, const Send& send) {
    for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
      if (entry->bytes.size() != size || std::memcmp(entry->bytes.data(), bytes, size) != 0) continue;
      entries_.splice(entries_.begin(), entries_, entry);
      return entry->memory;
    }
    const auto* begin = static_cast<const char*>(bytes);
    entries_.push_front({std::vector<char>(begin, begin + size), send()});
    if (entries_.size() > kEntries) entries_.pop_back();
    return entries_.front().memory;
  }

 private:
  struct Entry {
    std::vector<char> bytes;
    Memory memory;
  };
  std::list<Entry> entries_;  // the latest first
};

}  // namespace adahessian
