// The kernels of masks and masked weights of one tier against naive loops; part of kernels_main.cpp, whose Memory, Buffer,
// Expected and compare it uses, and kernels_coordconv.h's small_values.
#pragma once

namespace {

namespace maskmm = fourfold::maskmm;

// Packed rows of k bits in memory of exactly their size.
struct Bits {
  int64_t k;
  Memory memory;
  explicit Bits(int64_t columns) : k(columns), memory((columns + 63) / 64 * 8) {
    std::memset(memory.begin, 0xa5, memory.end - memory.begin);
  }
  uint8_t* data() { return reinterpret_cast<uint8_t*>(memory.begin); }
  bool get(int64_t i) { return data()[i / 8] >> (i % 8) & 1; }
  void set(const std::vector<bool>& values) {
    std::memset(memory.begin, 0, memory.end - memory.begin);
    for (int64_t i = 0; i < k; ++i) data()[i / 8] |= static_cast<uint8_t>(values[i] << (i % 8));
  }
};

std::vector<bool> random_bits(int64_t k) {
  std::vector<bool> bits(k);
  for (int64_t i = 0; i < k; ++i) bits[i] = random_below(3) == 0;
  return bits;
}

void check(bool ok, const char* tier, const char* what, int element, int64_t k) {
  ++checked;
  if (!ok && ++failed <= 20) std::printf("%s %s %s %d: wrong\n", tier, what, kElementName[element], static_cast<int>(k));
}

void check_bits(const char* tier, const char* what, int element, Bits& got, const std::vector<bool>& want) {
  bool ok = true;
  for (int64_t i = 0; i < got.k; ++i) ok &= got.get(i) == want[i];
  for (int64_t i = got.k; i < (got.k + 63) / 64 * 64; ++i) ok &= !got.get(i);
  check(ok, tier, what, element, got.k);
}

constexpr int64_t kColumns[] = {0, 1, 7, 16, 63, 64, 65, 100, 128, 200, 1030};

void test_bits(const maskmm::Kernels& kernels, const char* tier) {
  for (const int64_t k : kColumns) {
    const std::vector<bool> bits = random_bits(k);
    Memory mask(k), back(k);
    // Anything but 0 is true.
    for (int64_t i = 0; i < k; ++i) mask.begin[i] = static_cast<char>(bits[i] ? 1 + random_below(255) : 0);
    Bits packed(k);
    kernels.pack(reinterpret_cast<uint8_t*>(mask.begin), packed.data(), k);
    check_bits(tier, "pack", kFloat, packed, bits);
    kernels.unpack(packed.data(), reinterpret_cast<uint8_t*>(back.begin), k);
    bool ok = true;
    int64_t ones = 0;
    for (int64_t i = 0; i < k; ++i) ok &= back.begin[i] == (bits[i] ? 1 : 0), ones += bits[i];
    check(ok, tier, "unpack", kFloat, k);
    check(kernels.count(packed.data(), k) == ones, tier, "count", kFloat, k);
  }
}

void test_apply(const maskmm::Kernels& kernels, const char* tier) {
  for (int from = 0; from < kElements; ++from) {
    for (int to = 0; to < kElements; ++to) {
      if (kernels.apply[from][to] == nullptr) continue;
      for (const int64_t k : kColumns) {
        for (const bool is_signed : {false, true}) {
          const std::vector<bool> kept = random_bits(k), negative = random_bits(k);
          Bits bits(k), signs(k);
          bits.set(kept);
          signs.set(negative);
          Buffer weight = small_values(static_cast<Element>(from), k), out(static_cast<Element>(to), k);
          std::vector<double> want(k);
          for (int64_t i = 0; i < k; ++i) want[i] = kept[i] ? weight.get(i) * 2 * (is_signed && negative[i] ? -1 : 1) : 0;
          kernels.apply[from][to](weight.at(0), bits.data(), is_signed ? signs.data() : nullptr, 2.0, out.at(0), k);
          char what[100];
          std::snprintf(what, sizeof what, "%s apply %s to %s %d", tier, kElementName[from], kElementName[to],
                        static_cast<int>(k));
          compare(what, out, whole(want));
        }
      }
    }
  }
}

void test_scores(const maskmm::Kernels& kernels, const char* tier) {
  for (int e = 0; e < kElements; ++e) {
    const Element element = static_cast<Element>(e);
    for (const int64_t k : kColumns) {
      Buffer scores = small_values(element, k);
      std::vector<bool> at_least(k), below(k);
      for (int64_t i = 0; i < k; ++i) at_least[i] = scores.get(i) >= 0.3, below[i] = scores.get(i) < 0.25;
      Bits bits(k);
      check(!kernels.at_least[e](scores.at(0), 0.3, bits.data(), k), tier, "at_least", e, k);
      check_bits(tier, "at_least", e, bits, at_least);
      check(!kernels.below[e](scores.at(0), 0.25, bits.data(), k), tier, "below", e, k);
      check_bits(tier, "below", e, bits, below);
      for (const bool abs : {false, true}) {
        // The highest digit's histogram counts every score once; the key is looked for as cpu.cpp does.
        const int key_bits = element == kDouble ? 64 : 32;
        maskmm::Ranking ranking{abs, key_bits, 0, 0, true};
        int64_t wanted = (k + 2) / 3, equal = 0;
        if (k == 0) continue;
        while (ranking.shift > 0) {
          ranking.bits = std::min(maskmm::kDigitBits, ranking.shift);
          ranking.shift -= ranking.bits;
          std::vector<uint32_t> counts(maskmm::kTables << maskmm::kDigitBits);
          check(!kernels.histogram[e](scores.at(0), k, ranking, counts.data()), tier, "histogram", e, k);
          const auto found = [&](int64_t digit) {
            int64_t sum = 0;
            for (int table = 0; table < maskmm::kTables; ++table) sum += counts[(table << maskmm::kDigitBits) + digit];
            return sum;
          };
          int64_t digit = (1 << maskmm::kDigitBits) - 1;
          while (digit > 0 && found(digit) < wanted) wanted -= found(digit--);
          equal = found(digit);
          ranking.above = ranking.above << ranking.bits | static_cast<uint64_t>(digit);
          ranking.highest = false;
        }
        check(kernels.count_equal[e](scores.at(0), k, abs, ranking.above) == equal, tier, "count_equal", e, k);
        kernels.select[e](scores.at(0), k, abs, ranking.above, wanted, bits.data());
        std::vector<int64_t> order(k);
        for (int64_t i = 0; i < k; ++i) order[i] = i;
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
          const double x = scores.get(a), y = scores.get(b);
          return abs ? std::fabs(x) > std::fabs(y) : x > y;
        });
        std::vector<bool> kept(k);
        for (int64_t i = 0; i < (k + 2) / 3; ++i) kept[order[i]] = true;
        check_bits(tier, "select", e, bits, kept);
      }
      if (k == 0) continue;
      const double nan = std::nan("");
      const float single = std::nanf("");
      const uint16_t half = 0x7e00, brain = 0x7fc0;
      const void* const values[] = {&half, &brain, &single, &nan};
      std::memcpy(scores.at(k - 1), values[e], kBytes[e]);
      std::vector<uint32_t> counts(maskmm::kTables << maskmm::kDigitBits);
      check(kernels.at_least[e](scores.at(0), 0.0, bits.data(), k), tier, "NaN at_least", e, k);
      check(kernels.histogram[e](scores.at(0), k, {true, 21, 11, 0, true}, counts.data()), tier, "NaN histogram", e, k);
    }
  }
}

template <typename T>
void test_gradients(const maskmm::Gradients<T>& gradients, Element element, const char* tier) {
  for (const int64_t k : kColumns) {
    for (const maskmm::Slope slope : {maskmm::kSigmoid, maskmm::kSign, maskmm::kOne}) {
      Buffer grad = small_values(element, k), weight = small_values(element, k), scores = small_values(element, k);
      Buffer out(element, k);
      const std::vector<bool> kept = random_bits(k);
      Bits bits(k);
      bits.set(kept);
      std::vector<double> slopes(k), want(k);
      double dot = 0;
      for (int64_t i = 0; i < k; ++i) {
        const double s = scores.get(i), p = 1 / (1 + std::exp(-s));
        slopes[i] = slope == maskmm::kSigmoid ? p * (1 - p) : slope == maskmm::kOne ? 1 : (s > 0) - (s < 0);
        want[i] = grad.get(i) * weight.get(i) * slopes[i] * 1.5;
        dot += kept[i] ? grad.get(i) * weight.get(i) : 0;
      }
      const auto at = [](Buffer& buffer) { return reinterpret_cast<T*>(buffer.at(0)); };
      const double got = gradients.of_scores(at(grad), at(weight), at(scores), bits.data(), slope, T(1.5), at(out), k);
      check(got == dot, tier, "dot", element, k);  // sums of small fractions are exact
      compare("score gradients", out, whole(want));
      gradients.add_slope(at(scores), slope, T(0.25), at(out), k);
      for (int64_t i = 0; i < k; ++i) want[i] += slopes[i] * 0.25;
      compare("add_slope", out, whole(want));
    }
  }
}

// Philox4x32-10 of one counter, as its paper states it.
void philox(uint64_t counter, uint64_t seed, uint32_t (&word)[4]) {
  word[0] = static_cast<uint32_t>(counter), word[1] = static_cast<uint32_t>(counter >> 32), word[2] = word[3] = 0;
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * word[0], b = uint64_t{0xCD9E8D57} * word[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ word[1] ^ key[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ word[3] ^ key[1], static_cast<uint32_t>(a)};
    std::memcpy(word, next, sizeof next);
    key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
  }
}

// The stated sequence; volatile, so that every operation is rounded.
float stated_sigmoid(float s) {
  volatile float a = std::fabs(s) < 87.0f ? std::fabs(s) : 87.0f, n = a * 1.44269502f, r, t, e = 1.0f / 720;
  n = n + 12582912.0f;
  n = n - 12582912.0f;
  r = n * 0.693359375f;
  r = r - a;
  t = n * -2.12194440e-4f;
  r = r + t;
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    e = e * r;
    e = e + c;
  }
  e = std::ldexp(e, -static_cast<int>(n));
  t = 1.0f + e;
  return (s < 0 ? e : 1.0f) / t;
}

void test_bernoulli(const fourfold::sampling::Kernels& kernels, const char* tier) {
  const uint64_t seeds[] = {1, 0x123456789abcdef0, ~uint64_t{0}}, offsets[] = {0, 0xfffffff0, ~uint64_t{0} - 3};
  for (int e = 0; e < kElements; ++e) {
    for (const int64_t k : kColumns) {
      for (int variant = 0; variant < 6; ++variant) {
        const uint64_t seed = seeds[variant % 3], offset = offsets[variant / 2], first = variant * k;
        Buffer scores(static_cast<Element>(e), k);
        for (int64_t i = 0; i < k; ++i) encode(scores.element, small_value() * (variant == 5 ? 60 : 1), scores.at(i));
        std::vector<bool> want(k);
        for (int64_t i = 0; i < k; ++i) {
          uint32_t words[4];
          philox(offset + (first + i) / 4, seed, words);
          const float p = stated_sigmoid(static_cast<float>(scores.get(i)));
          want[i] = words[(first + i) % 4] < static_cast<uint64_t>(p * 4294967296.0f);
        }
        Bits bits(k);
        check(!kernels.bernoulli[e](scores.at(0), first, k, seed, offset, bits.data()), tier, "bernoulli", e, k);
        check_bits(tier, "bernoulli", e, bits, want);
      }
    }
  }
}

void test_maskmm(const maskmm::Kernels& kernels, const fourfold::sampling::Kernels& sampling, const char* tier) {
  test_bits(kernels, tier);
  test_apply(kernels, tier);
  test_scores(kernels, tier);
  test_gradients(kernels.floats, kFloat, tier);
  test_gradients(kernels.doubles, kDouble, tier);
  test_bernoulli(sampling, tier);
}

}  // namespace
