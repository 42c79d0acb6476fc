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
  for (const Element element : {kHalf, kBFloat16, kFloat, kDouble}) {
    const int64_t per_step = kernels.samples_per_step[element];
    for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{1, 16}, {16, 1}, {5, 9}, {16, 16}, {9, 14}}) {
      for (int64_t count : {1, 2, 7, 16, 33, 70}) {
        for (int steps = 0; steps < kSteps; ++steps) {
          Layer a = layer_of(element, rows, count, steps), b = layer_of(element, columns, count, (steps + 1) % kSteps);
          const int64_t depth = (count + per_step - 1) / per_step;
          Memory left(depth * cca::step_bytes(element)), right(depth * cca::step_bytes(element));
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

// ---- spectra -------------------------------------------------------------------------------------------------------------

namespace spectra = fourfold::spectra;

const double kTurn = 2 * std::acos(-1.0);

struct Waves {
  std::vector<double> cosines, sines;
  spectra::Direction direction;

  explicit Waves(int64_t size) : direction{size, nullptr, nullptr} {
    for (int64_t k = 0; k < direction.half(); ++k) {
      for (int64_t j = 0; j < direction.half(); ++j) cosines.push_back(std::cos(kTurn * (k * j % size) / size));
    }
    for (int64_t k = 1; k <= direction.pairs(); ++k) {
      for (int64_t j = 1; j <= direction.pairs(); ++j) sines.push_back(std::sin(kTurn * (k * j % size) / size));
    }
    direction.cosines = cosines.data(), direction.sines = sines.data();
  }
};

// One (k, l) of each pair of conjugate frequencies, in the order of the results.
std::vector<std::pair<int64_t, int64_t>> half_plane(int64_t h, int64_t w) {
  std::vector<std::pair<int64_t, int64_t>> found;
  for (int64_t l = 0; l <= w / 2; ++l) {
    found.push_back({0, l});
    if (h % 2 == 0) found.push_back({h / 2, l});
    for (int64_t k = 1; k <= (h - 1) / 2; ++k) {
      found.push_back({k, l});
      if (2 * l % w != 0) found.push_back({-k, l});
    }
  }
  return found;
}

void test_transform(const spectra::Kernels& kernels, const char* tier) {
  const int64_t sizes[][2] = {{1, 1}, {1, 2}, {2, 1}, {3, 4}, {5, 2}, {4, 6}, {7, 9}, {2, 17}, {9, 8}};
  for (int e = 0; e < kElements; ++e) {
    for (int p = 0; p < spectra::kSpectraTypes; ++p) {
      for (const auto& [h, w] : sizes) {
        for (int layout = 0; layout < 3; ++layout) {
          for (const int64_t count : {int64_t{1}, kernels.channels - 1, kernels.channels}) {
            const int64_t channel_step = layout == 0 ? h * w + 1 : layout == 1 ? 1 : 2 * h * w + 1;
            const int64_t column_step = layout == 0 ? 1 : layout == 1 ? count + 1 : 2, row_step = w * column_step;
            const auto at = [&](int64_t c, int64_t i, int64_t j) { return c * channel_step + i * row_step + j * column_step; };
            Buffer x = small_values(static_cast<Element>(e), at(count - 1, h - 1, w - 1) + 1);
            Buffer pivot = small_values(kDouble, h * w * kernels.channels);
            const auto frequencies = half_plane(h, w);
            const int64_t imaginary_step = count + 2, frequency_step = 2 * imaginary_step + 1;
            Buffer out(p == spectra::kDoubleSpectra ? kDouble : kFloat,
                       (frequencies.size() - 1) * frequency_step + imaginary_step + count);
            Expected expected;
            for (size_t f = 0; f < frequencies.size(); ++f) {
              for (int64_t c = 0; c < count; ++c) {
                double real = 0, imaginary = 0;
                for (int64_t i = 0; i < h; ++i) {
                  for (int64_t j = 0; j < w; ++j) {
                    const double angle = kTurn * (static_cast<double>(frequencies[f].first * i) / h +
                                                  static_cast<double>(frequencies[f].second * j) / w);
                    const double value = x.get(at(c, i, j)) - pivot.get((i * w + j) * kernels.channels + c);
                    real += value * std::cos(angle), imaginary += value * std::sin(angle);
                  }
                }
                expected.place.push_back(f * frequency_step + c), expected.value.push_back(real);
                expected.place.push_back(f * frequency_step + imaginary_step + c), expected.value.push_back(imaginary);
              }
            }
            const Waves of_h(h), of_w(w);
            Memory scratch(kernels.transform_scratch(h, w));
            const double* shift = reinterpret_cast<double*>(pivot.at(0));
            const spectra::Image image{x.at(0), count, channel_step, row_step, column_step, shift};
            const spectra::Spectra to{out.at(0), frequency_step, imaginary_step, count % 2 == 0};
            kernels.transform[e][p](of_h.direction, of_w.direction, image, to, scratch.begin);
            kernels.fence();
            char what[200];
            std::snprintf(what, sizeof what, "%s spectra %s, %d x %d, %d channels, layout %d", tier, kElementName[e],
                          static_cast<int>(h), static_cast<int>(w), static_cast<int>(count), layout);
            compare(what, out, expected);
          }
        }
      }
    }
  }
}

void test_spectra_gram(const spectra::Kernels& kernels, const char* tier) {
  const int64_t shapes[][2] = {{1, 1}, {1, 40}, {40, 1}, {5, 9}, {8, 16}, {16, 32}, {17, 33}, {31, 30}};
  for (int p = 0; p < spectra::kSpectraTypes; ++p) {
    for (const auto& [rows, columns] : shapes) {
      for (const int64_t count : {int64_t{1}, int64_t{7}, spectra::kDepth}) {
        for (const bool with_sums : {false, true}) {
          const Element type = p == spectra::kDoubleSpectra ? kDouble : kFloat;
          Buffer a = small_values(type, 2 * count * (rows + 1) - 1), b = small_values(type, 2 * count * columns);
          const spectra::Samples left{a.at(0), rows, count * (rows + 1), rows + 1};
          const spectra::Samples right{b.at(0), columns, count * columns, columns};
          const int64_t row_step = columns + 2;
          Buffer total(kDouble, (rows - 1) * row_step + columns), sums(kDouble, 2 * rows);
          Expected expected, moments;
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < columns; ++c) {
              double sum = kUntouched;
              for (int64_t k = 0; k < count; ++k) {
                const int64_t i = k * (rows + 1) + r, j = k * columns + c;
                const double real = b.get(j), imaginary = b.get(count * columns + j);
                sum += a.get(i) * (real + imaginary) + a.get(count * (rows + 1) + i) * (imaginary - real);
              }
              expected.place.push_back(r * row_step + c), expected.value.push_back(sum);
            }
            for (int part = 0; with_sums && part < 2; ++part) {
              double sum = kUntouched;
              for (int64_t k = 0; k < count; ++k) sum += a.get(part * count * (rows + 1) + k * (rows + 1) + r);
              moments.place.push_back(2 * r + part), moments.value.push_back(sum);
            }
          }
          Memory scratch(kernels.gram_scratch(rows, columns));
          kernels.gram[p](left, right, count, reinterpret_cast<double*>(total.at(0)), row_step,
                          with_sums ? reinterpret_cast<double*>(sums.at(0)) : nullptr, scratch.begin);
          char what[200];
          std::snprintf(what, sizeof what, "%s product of spectra %s, %d x %d, %d samples", tier, kElementName[type],
                        static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(count));
          compare(what, total, expected);
          compare(what, sums, moments);
        }
      }
    }
  }
}

void test_spectra(const spectra::Kernels& kernels, const char* tier) {
  test_transform(kernels, tier);
  test_spectra_gram(kernels, tier);
}

void test_cca(const cca::Kernels& kernels, const char* tier) {
  test_pack(kernels, tier);
  test_add_wide(kernels, tier);
  test_nonfinite(kernels, tier);
  test_gram(kernels, tier);
}

}  // namespace
