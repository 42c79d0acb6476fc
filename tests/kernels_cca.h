// The kernels of representation similarity of one tier against loops in double; part of kernels_main.cpp, whose Buffer,
// Expected and compare it uses, and kernels_coordconv.h's small_values and kernels_maskmm.h's check.
#pragma once

#include "kernels_coordconv.h"
#include "kernels_maskmm.h"

namespace {

namespace cca = fourfold::cca;

// `channels` by `count` numbers, steps apart.
struct Layer {
  int64_t channels, count, channel_step, sample_step;
  Buffer memory;

  Layer(Element element, int64_t c, int64_t n, int64_t of_channel, int64_t of_sample)
      : channels(c),
        count(n),
        channel_step(of_channel),
        sample_step(of_sample),
        memory(small_values(element, (c - 1) * of_channel + (n - 1) * of_sample + 1)) {}

  double get(int64_t channel, int64_t sample) { return memory.get(channel * channel_step + sample * sample_step); }
  cca::Samples samples() { return {memory.at(0), channels, count, channel_step, sample_step}; }
};

// Channels beside each other, samples beside each other, neither.
constexpr int kSteps = 3;

Layer layer_of(Element element, int64_t channels, int64_t count, int steps) {
  if (steps == 0) return Layer(element, channels, count, 1, channels + 3);
  if (steps == 1) return Layer(element, channels, count, count + 5, 1);
  return Layer(element, channels, count, 2, 2 * channels + 1);
}

void test_pack(const cca::Kernels& kernels, const char* tier) {
  const int64_t shapes[][2] = {{1, 1}, {1, 9}, {3, 4}, {4, 17}, {8, 16}, {9, 7}, {16, 33}, {17, 5}, {40, 20}, {65, 3}};
  for (int e = 0; e < kElements; ++e) {
    for (int p = 0; p < cca::kPanelTypes; ++p) {
      for (const auto& [channels, count] : shapes) {
        for (int steps = 0; steps < kSteps; ++steps) {
          const Element type = p == cca::kDoublePanel ? kDouble : kFloat;
          const int64_t row_step = channels + steps, norm_step = 1 + steps;
          Layer x = layer_of(static_cast<Element>(e), channels, count, steps);
          Buffer pivot = small_values(kDouble, channels), sums = small_values(kDouble, channels + 1);
          Buffer panel(type, (count - 1) * row_step + channels), norms(type, (count - 1) * norm_step + 1);
          Expected rows, squares, columns;
          for (int64_t c = 0; c <= channels; ++c) columns.place.push_back(c), columns.value.push_back(sums.get(c));
          for (int64_t k = 0; k < count; ++k) {
            double square = 0;
            for (int64_t c = 0; c < channels; ++c) {
              const double value = x.get(c, k) - pivot.get(c);
              rows.place.push_back(k * row_step + c), rows.value.push_back(value);
              columns.value[c] += value;
              square += value * value;
            }
            squares.place.push_back(k * norm_step), squares.value.push_back(square);
            columns.value[channels] += square;
          }
          const cca::Rows to{panel.at(0), row_step, norms.at(0), norm_step};
          kernels.pack[e][p](x.samples(), reinterpret_cast<double*>(pivot.at(0)), to, reinterpret_cast<double*>(sums.at(0)));
          char what[200];
          std::snprintf(what, sizeof what, "%s pack %s to %s, %d channels, %d samples, steps %d", tier, kElementName[e],
                        kElementName[type], static_cast<int>(channels), static_cast<int>(count), steps);
          compare(what, panel, rows);
          compare(what, norms, squares);
          compare(what, sums, columns);
        }
      }
    }
  }
}

void test_add_wide(const cca::Kernels& kernels, const char* tier) {
  for (int64_t n : {0, 1, 7, 16, 33, 100}) {
    Buffer total = small_values(kDouble, n), part = small_values(kFloat, n);
    std::vector<double> sums(n);
    for (int64_t i = 0; i < n; ++i) sums[i] = total.get(i) + part.get(i);
    kernels.add_wide(reinterpret_cast<double*>(total.at(0)), reinterpret_cast<float*>(part.at(0)), n);
    char what[100];
    std::snprintf(what, sizeof what, "%s add_wide %d", tier, static_cast<int>(n));
    compare(what, total, whole(sums));
  }
}

void test_nonfinite(const cca::Kernels& kernels, const char* tier) {
  for (int e = 0; e < kElements; ++e) {
    for (int64_t n : {0, 1, 15, 32, 64, 100, 259}) {
      for (int64_t step : {1, 3}) {
        Buffer x = small_values(static_cast<Element>(e), n > 0 ? (n - 1) * step + 1 : 0);
        int64_t wanted = 0;
        for (int64_t i = 0; i < x.count; ++i) {
          if (random_below(5) != 0) continue;
          // All bits set but for the sign: a NaN of every type; with the low ones cleared, an infinity of the wide ones.
          std::memset(x.at(i), 0xff, kBytes[e]);
          if (e == kFloat && random_below(2)) std::memcpy(x.at(i), "\0\0\x80\x7f", 4);
          if (e == kDouble && random_below(2)) std::memcpy(x.at(i), "\0\0\0\0\0\0\xf0\xff", 8);
          wanted += i % step == 0;
        }
        check(kernels.count_nonfinite[e](x.at(0), n, step) == wanted, tier, "count_nonfinite", e, n);
      }
    }
  }
}

void test_gram(const cca::Kernels& kernels, const char* tier) {
  for (const Element element : {kHalf, kBFloat16}) {
    const int64_t per_step = kernels.samples_per_step[element];
    for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{1, 16}, {16, 1}, {5, 9}, {16, 16}, {9, 14}}) {
      for (int64_t count : {1, 2, 7, 16, 33, 70}) {
        for (int steps = 0; steps < kSteps; ++steps) {
          Layer a = layer_of(element, rows, count, steps), b = layer_of(element, columns, count, (steps + 1) % kSteps);
          const int64_t depth = (count + per_step - 1) / per_step;
          Memory left(depth * cca::kStepBytes), right(depth * cca::kStepBytes);
          kernels.pack_block[element](a.samples(), left.begin);
          kernels.pack_block[element](b.samples(), right.begin);
          const int64_t row_step = columns + 2;
          Buffer total(kDouble, (rows - 1) * row_step + columns);
          Expected expected;
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < columns; ++c) {
              double sum = kUntouched;
              for (int64_t k = 0; k < count; ++k) sum += a.get(r, k) * b.get(c, k);
              expected.place.push_back(r * row_step + c), expected.value.push_back(sum);
            }
          }
          kernels.add_tile[element](left.begin, right.begin, depth, reinterpret_cast<double*>(total.at(0)), row_step, rows,
                                    columns);
          char what[200];
          std::snprintf(what, sizeof what, "%s tile %s, %d x %d, %d samples, steps %d", tier, kElementName[element],
                        static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(count), steps);
          compare(what, total, expected);
        }
      }
    }
  }
}

void test_cca(const cca::Kernels& kernels, const char* tier) {
  test_pack(kernels, tier);
  test_add_wide(kernels, tier);
  test_nonfinite(kernels, tier);
  test_gram(kernels, tier);
}

}  // namespace
