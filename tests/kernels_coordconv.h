// The CoordConv kernels of one tier against loops in double; part of kernels_main.cpp, whose Buffer, Expected and compare it
// uses.
#pragma once

namespace {

// Sums of a few of these are exact in every element type.
double small_value() { return (random_below(31) - 15) / 8.0; }

Buffer small_values(Element element, int64_t count) {
  Buffer buffer(element, count);
  for (int64_t i = 0; i < count; ++i) encode(element, small_value(), buffer.at(i));
  return buffer;
}

Expected whole(const std::vector<double>& values) {
  Expected expected;
  expected.value = values;
  for (size_t i = 0; i < values.size(); ++i) expected.place.push_back(static_cast<int64_t>(i));
  return expected;
}

double activated_value(int activation, double x) {
  if (activation == fourfold::coordconv::kRelu) return x > 0 ? x : 0;
  if (activation == fourfold::coordconv::kSilu) return x / (1 + std::exp(-x));
  if (activation == fourfold::coordconv::kGelu) return x * std::erfc(-x * std::sqrt(0.5)) / 2;
  return x;
}

Element map_type(int element) { return element == kDouble ? kDouble : kFloat; }

void test_add_map(const fourfold::coordconv::Kernels& kernels, const char* tier) {
  const int64_t shapes[][2] = {{1, 1},  {1, 7}, {1, 16}, {1, 131}, {2, 1},  {37, 1}, {3, 2},   {9, 3},
                               {40, 5}, {5, 8}, {6, 17}, {33, 24}, {2, 64}, {3, 65}, {2, 100}, {1, 1030}};
  for (int e = 0; e < kElements; ++e) {
    for (int a = 0; a < fourfold::coordconv::kActivations; ++a) {
      for (const auto& shape : shapes) {
        for (int variant = 0; variant < 4; ++variant) {
          const bool keep = variant & 1, with_across = variant & 2;
          const int64_t rows = shape[0], width = shape[1], n = rows * width;
          const Element element = static_cast<Element>(e), type = map_type(e);
          Buffer y = small_values(element, n), along = small_values(type, n), across = small_values(type, width);
          Buffer activated(element, keep ? n : 0);
          std::vector<double> sums(n), results(n);
          for (int64_t i = 0; i < n; ++i) {
            sums[i] = y.get(i) + along.get(i) + (with_across ? across.get(i % width) : 0);
            results[i] = activated_value(a, sums[i]);
          }
          kernels.add_map[e][a](y.at(0), along.at(0), with_across ? across.at(0) : nullptr, keep ? activated.at(0) : nullptr,
                                rows, width);
          char what[200];
          std::snprintf(what, sizeof what, "%s add_map %s activation %d, %d x %d variant %d", tier, kElementName[e], a,
                        static_cast<int>(rows), static_cast<int>(width), variant);
          compare(what, y, whole(keep ? sums : results));
          if (keep) compare(what, activated, whole(results));
        }
      }
    }
  }
}

void test_add_grads(const fourfold::coordconv::Kernels& kernels, const char* tier) {
  for (int e = 0; e < kElements; ++e) {
    for (int64_t n : {1, 5, 8, 16, 33, 100, 259}) {
      for (int64_t samples : {0, 1, 2, 7}) {
        for (bool masked : {false, true}) {
          const Element element = static_cast<Element>(e);
          const int64_t step = n + 3, all = samples * step, beside = masked ? all : 0;
          Buffer grad = small_values(element, all), relu = small_values(element, beside);
          Buffer kept = small_values(element, beside), total = small_values(map_type(e), n);
          std::vector<double> counted(beside), totals(n);
          for (int64_t i = 0; i < beside; ++i) counted[i] = kept.get(i);
          for (int64_t i = 0; i < n; ++i) {
            totals[i] = total.get(i);
            for (int64_t at = i; at < all; at += step) {
              const double value = masked && relu.get(at) <= 0 ? 0 : grad.get(at);
              totals[i] += value;
              if (masked) counted[at] = value;
            }
          }
          kernels.add_grads[e](grad.at(0), masked ? relu.at(0) : nullptr, masked ? kept.at(0) : nullptr, total.at(0), n,
                               samples, step);
          char what[200];
          std::snprintf(what, sizeof what, "%s add_grads %s, %d x %d%s", tier, kElementName[e], static_cast<int>(samples),
                        static_cast<int>(n), masked ? " masked" : "");
          compare(what, total, whole(totals));
          if (masked) compare(what, kept, whole(counted));
        }
      }
    }
  }
}

template <typename T>
void test_pieces(const fourfold::coordconv::Pieces<T>& pieces, Element type, const char* tier) {
  const auto at = [](Buffer& buffer) { return reinterpret_cast<T*>(buffer.at(0)); };
  const auto one = [&](double value) {
    Buffer result(type, 1);
    encode(type, value, result.at(0));
    return result;
  };
  for (int64_t n : {1, 3, 4, 7, 8, 16, 19, 64, 117}) {
    char what[200];
    std::snprintf(what, sizeof what, "%s pieces %s, %d", tier, kElementName[type], static_cast<int>(n));
    Buffer in = small_values(type, n), other = small_values(type, n);
    const std::vector<double> none(n);
    std::vector<double> expected[3] = {none, none, none};
    double sum = 0, product = 0;
    Buffer outs[3] = {small_values(type, n), small_values(type, n), Buffer(type, n)};
    for (int64_t i = 0; i < n; ++i) {
      expected[0][i] = outs[0].get(i) + in.get(i);
      expected[1][i] = outs[1].get(i) + in.get(i) * 0.75;
      expected[2][i] = in.get(i) + 0.5;
      sum += in.get(i), product += in.get(i) * other.get(i);
    }
    pieces.add(at(outs[0]), at(in), n);
    pieces.add_multiple(at(outs[1]), at(in), T(0.75), n);
    pieces.add_number(at(outs[2]), at(in), T(0.5), n);
    for (int k = 0; k < 3; ++k) compare(what, outs[k], whole(expected[k]));
    Buffer total = one(static_cast<double>(pieces.sum(at(in), n))),
           dot = one(static_cast<double>(pieces.dot(at(in), at(other), n)));
    compare(what, total, whole({sum}));
    compare(what, dot, whole({product}));
    // Rows with and without gaps; the last one ends where memory does.
    for (int64_t rows : {1, 2, 9}) {
      for (int64_t gap : {0, 3}) {
        const int64_t step = n + gap, count = (rows - 1) * step + n;
        Buffer from = small_values(type, count), to = small_values(type, count), into = small_values(type, n);
        std::vector<double> added(count), summed(n);
        for (int64_t i = 0; i < count; ++i) added[i] = to.get(i) + (i % step < n ? from.get(i) : 0);
        for (int64_t i = 0; i < n; ++i) {
          summed[i] = into.get(i);
          for (int64_t r = 0; r < rows; ++r) summed[i] += from.get(r * step + i);
        }
        pieces.add_rows(at(to), step, at(from), step, rows, n);
        pieces.sum_rows(at(into), at(from), step, rows, n);
        compare(what, to, whole(added));
        compare(what, into, whole(summed));
      }
    }
  }
}

void test_coordconv(const fourfold::coordconv::Kernels& kernels, const char* tier) {
  test_add_map(kernels, tier);
  test_add_grads(kernels, tier);
  test_pieces(kernels.floats, kFloat, tier);
  test_pieces(kernels.doubles, kDouble, tier);
}

}  // namespace
