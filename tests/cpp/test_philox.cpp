// Philox4x32-10 gives the known answers of its authors' library, and the launchers draw their signs from it.
#include "check.h"
#include "expected.h"
#include "tests.h"

namespace adahessian::test {
namespace {

struct KnownAnswer {
  Words counter;
  std::array<uint32_t, 2> key;
  Words words;
};

// Random123's kat_vectors for philox4x32 with 10 rounds.
const KnownAnswer kKnownAnswers[] = {
    {{0, 0, 0, 0}, {0, 0}, {0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8}},
    {{0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF},
     {0xFFFFFFFF, 0xFFFFFFFF},
     {0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD}},
    {{0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344},
     {0xA4093822, 0x299F31D0},
     {0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1}},
};

}  // namespace

void test_philox() {
  for (const auto& [c, key, words] : kKnownAnswers) {
    const auto drawn = philox4x32(c[0], c[1], c[2], c[3], key[0], key[1]);
    check(std::equal(words.begin(), words.end(), drawn.word), "adahessian_math.h: known answer");
    check(philox(c, key) == words, "the plain loop: known answer");
  }
  for (const Engine& engine : kEngines) {
    Problem<float> problem(std::vector<Shape>{{128}});
    problem.segments[0].param_id = 0;
    problem.probe = {0, 0, true};  // counter and key are all zeros
    problem.rademacher(engine);
    Elements elements(engine.name + ": signs of the known answer");
    for (int64_t l = 0; l < 128; ++l) {
      const uint32_t word = kKnownAnswers[0].words[size_t(l / 32)];
      elements.equal(l, problem.z[l], word >> (l % 32) & 1 ? -1 : 1);
    }
  }
}

}  // namespace adahessian::test
