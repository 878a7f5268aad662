// Memory as the kernels' bodies see it: checked shared memory and 128-bit access to global memory, in lines that both
// nvcc and a host compiler take. On the host every access is checked, so that a wrong index shows without a GPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "../dtypes.h"

namespace adahessian::gpu {

// A condition the kernels rely on. Costs nothing on the device.
ADAHESSIAN_HD void expect([[maybe_unused]] bool condition, [[maybe_unused]] const char* what) {
#ifndef __CUDA_ARCH__
  if (!condition) throw std::logic_error(what);
#endif
}

// Keeps the compiler from interleaving what is before with what is behind.
ADAHESSIAN_HD void in_sequence() {
#ifdef __CUDA_ARCH__
  asm volatile("" ::: "memory");
#endif
}

// Adds to a number in global memory that other thread blocks may be adding to.
ADAHESSIAN_HD void add_atomically(int64_t* target, int amount) {
#ifdef __CUDA_ARCH__
  atomicAdd(reinterpret_cast<unsigned long long*>(target), static_cast<unsigned long long>(amount));
#else
  *target += amount;
#endif
}

template <typename E, int n>
struct SharedArray {
  E data[n];
};

template <typename E, int n>
ADAHESSIAN_HD E& at(SharedArray<E, n>& array, int i) {
  expect(i >= 0 && i < n, "index outside shared memory");
  return array.data[i];
}

template <typename E, int n>
ADAHESSIAN_HD const E& at(const SharedArray<E, n>& array, int i) {
  expect(i >= 0 && i < n, "index outside shared memory");
  return array.data[i];
}

// What a thread holds of an array: n neighbouring elements, one or two 128-bit accesses. 16-bit elements stay packed in
// pairs, or the compiler would give each of them a register.
template <typename E, int n>
struct alignas(16) Vec {
  using Word = std::conditional_t<sizeof(E) == 2, uint32_t, E>;
  Word word[n * sizeof(E) / sizeof(Word)];
};

template <typename E, int n>
ADAHESSIAN_HD E get(const Vec<E, n>& vec, int e) {
  if constexpr (sizeof(E) == 2) {
    return E{uint16_t(vec.word[e / 2] >> (16 * (e % 2)))};
  } else {
    return vec.word[e];
  }
}

template <typename E, int n>
ADAHESSIAN_HD void set(Vec<E, n>& vec, int e, E value) {
  if constexpr (sizeof(E) == 2) {
    const int shift = 16 * (e % 2);
    vec.word[e / 2] = (vec.word[e / 2] & ~(0xFFFFu << shift)) | uint32_t(value.bits) << shift;
  } else {
    vec.word[e] = value;
  }
}

ADAHESSIAN_HD bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// The pointer with the promise that it is to global memory, which a pointer from a table does not tell the compiler.
template <typename E>
ADAHESSIAN_HD E* in_global(E* pointer) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// A number in the type it is stored in.
template <typename E>
ADAHESSIAN_HD E stored(StateOf<E> x) {
  E result;
  store_to(result, x);
  return result;
}

// 128-bit words number i of a vector, spelled out: a memcpy would end as four accesses of 32 bits.
#ifdef __CUDA_ARCH__
template <typename E, int n>
ADAHESSIAN_HD uint4 get_word(const Vec<E, n>& vec, int i) {
  uint32_t part[4];
  ADAHESSIAN_UNROLL
  for (int k = 0; k < 4; ++k) memcpy(&part[k], reinterpret_cast<const char*>(&vec) + 16 * i + 4 * k, 4);
  return make_uint4(part[0], part[1], part[2], part[3]);
}

template <typename E, int n>
ADAHESSIAN_HD void set_word(Vec<E, n>& vec, int i, uint4 word) {
  const uint32_t part[4] = {word.x, word.y, word.z, word.w};
  ADAHESSIAN_UNROLL
  for (int k = 0; k < 4; ++k) memcpy(reinterpret_cast<char*>(&vec) + 16 * i + 4 * k, &part[k], 4);
}
#endif

template <typename E, int n>
ADAHESSIAN_HD void load_aligned(Vec<E, n>& target, const E* source) {
  static_assert(sizeof(target) % 16 == 0, "a vector is a whole number of 128-bit words");
  expect(is_aligned(source), "misaligned 128-bit load");
#ifdef __CUDA_ARCH__
  ADAHESSIAN_UNROLL
  for (int i = 0; i < int(sizeof(target) / 16); ++i) {
    set_word(target, i, reinterpret_cast<const uint4*>(in_global(source))[i]);
  }
#else
  memcpy(&target, source, sizeof(target));
#endif
}

template <typename E, int n>
ADAHESSIAN_HD void store_aligned(E* target, const Vec<E, n>& source) {
  expect(is_aligned(target), "misaligned 128-bit store");
#ifdef __CUDA_ARCH__
  ADAHESSIAN_UNROLL
  for (int i = 0; i < int(sizeof(source) / 16); ++i) {
    // An assignment would be merged with the elementwise stores of a neighbouring branch, and split.
    const uint4 word = get_word(source, i);
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(reinterpret_cast<uint4*>(target) + i), "r"(word.x),
                 "r"(word.y), "r"(word.z), "r"(word.w)
                 : "memory");
  }
#else
  memcpy(target, &source, sizeof(source));
#endif
}

}  // namespace adahessian::gpu
