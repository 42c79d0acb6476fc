// Spectra of images on CPU: checks, cosines and sines, threads. The arithmetic is in spectra_kernels.cpp, the meaning in
// reference/cca_ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "cca/spectra_kernels.h"
#include "common/checks.h"
#include "common/isa.h"

namespace fourfold {

FOURFOLD_DECLARE_KERNELS(spectra)

namespace spectra {
namespace {

using torch::stable::Tensor;

const Kernels& kernels() {
  static const Kernels& best = FOURFOLD_BEST_KERNELS(spectra);
  return best;
}

// Results from this size on, in bytes, are stored past the caches.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// Cosines and sines of a direction.
struct Waves {
  std::vector<double> cosines, sines;
  Direction direction;

  explicit Waves(int64_t size) {
    std::vector<double> cosine(size), sine(size);
    for (int64_t t = 0; t < size; ++t) {
      const double angle = 2 * std::acos(-1.0) * static_cast<double>(t) / static_cast<double>(size);
      // Exact where a wave is zero: a frequency that is real has no imaginary part.
      cosine[t] = 4 * t == size || 4 * t == 3 * size ? 0 : std::cos(angle);
      sine[t] = 2 * t % size == 0 ? 0 : std::sin(angle);
    }
    direction = {size, nullptr, nullptr};
    for (int64_t k = 0; k < direction.half(); ++k) {
      for (int64_t j = 0; j < direction.half(); ++j) cosines.push_back(cosine[k * j % size]);
    }
    for (int64_t k = 1; k <= direction.pairs(); ++k) {
      for (int64_t j = 1; j <= direction.pairs(); ++j) sines.push_back(sine[k * j % size]);
    }
    direction.cosines = cosines.data(), direction.sines = sines.data();
  }
};

// Whether no two elements share memory, in any order of the dimensions.
bool apart(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> order;  // step, size
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) > 1) order.push_back({t.stride(d), t.size(d)});
  }
  std::sort(order.begin(), order.end());
  int64_t last = 0;
  for (const auto& [step, size] : order) {
    if (step <= last) return false;
    last += (size - 1) * step;
  }
  return true;
}

// Whether the stretches of memory that they lie in meet.
bool meet(const Tensor& a, const Tensor& b) {
  const auto extent = [](const Tensor& t) {
    const char* begin = static_cast<const char*>(t.const_data_ptr());
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    return std::pair<const char*, const char*>{begin, begin + (last + 1) * t.element_size()};
  };
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto [begin, end] = extent(a);
  const auto [other_begin, other_end] = extent(b);
  return begin < other_end && other_begin < end;
}

// Memory of a thread, at first 0: lanes that nobody looks at are computed with as well.
struct Scratch {
  std::unique_ptr<char[]> memory;
  char* begin;

  explicit Scratch(int64_t bytes) : memory(new char[bytes + kernels().alignment]()) {
    begin = memory.get() + (kernels().alignment - reinterpret_cast<uintptr_t>(memory.get()) % kernels().alignment);
  }
};

// Work on one frequency or image below which a second thread costs more than it brings.
constexpr int64_t kGrain = 65536;

void image_spectra(const Tensor& x, const Tensor& pivot, Tensor spectra) {
  const char* op = "_image_spectra";
  require_floating(op, "x", x);
  require(x.is_cpu() && x.dim() == 4, op, ": x must be [n, c, h, w] on the CPU, got ", shape_of(x));
  const int64_t n = x.size(0), channels = x.size(1), h = x.size(2), w = x.size(3);
  require(h > 0 && w > 0, op, ": x must have pixels, got ", shape_of(x));
  require(pivot.is_cpu() && pivot.scalar_type() == ScalarType::Double && pivot.dim() == 3 && pivot.size(0) == channels &&
              pivot.size(1) == h && pivot.size(2) == w,
          op, ": pivot must be [", channels, ", ", h, ", ", w, "] in float64, got ", shape_of(pivot));
  // A frequency is its own conjugate where both of its numbers are 0 or half of the size.
  const int64_t own = (h % 2 == 0 ? 2 : 1) * (w % 2 == 0 ? 2 : 1), frequencies = (h * w + own) / 2;
  const bool wide = spectra.scalar_type() == ScalarType::Double;
  require(spectra.is_cpu() && (wide || spectra.scalar_type() == ScalarType::Float) && spectra.dim() == 4 &&
              spectra.size(0) == frequencies && spectra.size(1) == 2 && spectra.size(2) == n && spectra.size(3) == channels,
          op, ": spectra must be [", frequencies, ", 2, ", n, ", ", channels, "] in float32 or float64, got ",
          shape_of(spectra));
  require(channels <= 1 || spectra.stride(3) == 1, op, ": the channels of spectra must be contiguous");
  require(apart(spectra), op, ": spectra must not be an expanded tensor, whose elements share memory");
  require(!meet(spectra, x), op, ": spectra must not share memory with x");
  require(!meet(spectra, pivot), op, ": spectra must not share memory with pivot");
  if (n == 0 || channels == 0) return;
  const int64_t together = kernels().channels, teams = (channels + together - 1) / together;
  // The pivot as the kernel wants it: for every team of channels [h, w, together].
  Scratch shift(teams * h * w * together * 8);
  double* shifts = reinterpret_cast<double*>(shift.begin);
  const Tensor dense = torch::stable::contiguous(pivot);
  const double* of_pivot = static_cast<const double*>(dense.const_data_ptr());
  for (int64_t c = 0; c < teams * together; ++c) {
    double* to = shifts + c / together * (h * w * together) + c % together;
    for (int64_t p = 0; p < h * w; ++p) to[p * together] = c < channels ? of_pivot[c * h * w + p] : 0;
  }
  const Waves of_h(h), of_w(w);
  const char* data = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(spectra.mutable_data_ptr());
  const int64_t from_bytes = x.element_size(), to_bytes = spectra.element_size();
  const bool stream = spectra.numel() * to_bytes >= kStreamBytes;
  const auto transform = kernels().transform[element_of(x)][wide ? kDoubleSpectra : kFloatSpectra];
  const int64_t steps[] = {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  const int64_t to_steps[] = {spectra.stride(0), spectra.stride(1), spectra.stride(2)};
  const int64_t grain = std::max<int64_t>(1, kGrain / (h * w * (h + w)));
  torch::stable::parallel_for(0, n * teams, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(kernels().transform_scratch(h, w));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / teams, first = i % teams * together;
      const Image image{data + (sample * steps[0] + first * steps[1]) * from_bytes,
                        std::min(together, channels - first),
                        channels == 1 ? 0 : steps[1],
                        steps[2],
                        steps[3],
                        shifts + first * h * w};
      const Spectra place{to + (sample * to_steps[2] + first) * to_bytes, to_steps[0], to_steps[1], stream};
      transform(of_h.direction, of_w.direction, image, place, scratch.begin);
    }
    if (stream) kernels().fence();
  });
}

void spectra_gram(const Tensor& a, const Tensor& b, Tensor total, std::optional<Tensor> sums) {
  const char* op = "_spectra_gram_";
  const bool wide = a.scalar_type() == ScalarType::Double;
  require(a.is_cpu() && (wide || a.scalar_type() == ScalarType::Float) && a.dim() == 4 && a.size(1) == 2, op,
          ": a must be [F, 2, n, c] on the CPU in float32 or float64, got ", shape_of(a));
  require(b.is_cpu() && b.scalar_type() == a.scalar_type() && b.dim() == 4 && b.size(0) == a.size(0) && b.size(1) == 2 &&
              b.size(2) == a.size(2),
          op, ": b must be [", a.size(0), ", 2, ", a.size(2), ", c] in a's type, got ", shape_of(b));
  const int64_t frequencies = a.size(0), n = a.size(2), rows = a.size(3), columns = b.size(3);
  require(total.is_cpu() && total.scalar_type() == ScalarType::Double && total.dim() == 3 && total.size(0) == frequencies &&
              total.size(1) == rows && total.size(2) == columns,
          op, ": total must be [", frequencies, ", ", rows, ", ", columns, "] in float64, got ", shape_of(total));
  require((columns <= 1 || total.stride(2) == 1) && apart(total), op, ": total must have contiguous rows that don't overlap");
  require(!meet(total, a) && !meet(total, b), op, ": total must not share memory with a or b");
  double* of_sums = nullptr;
  if (sums) {
    require(sums->is_cpu() && sums->scalar_type() == ScalarType::Double && sums->dim() == 3 && sums->size(0) == frequencies &&
                sums->size(1) == rows && sums->size(2) == 2 && sums->is_contiguous(),
            op, ": sums must be contiguous [", frequencies, ", ", rows, ", 2] in float64, got ", shape_of(*sums));
    require(!meet(*sums, a) && !meet(*sums, b) && !meet(*sums, total), op, ": sums must not share memory with a, b or total");
    of_sums = static_cast<double*>(sums->mutable_data_ptr());
  }
  if (n == 0 || frequencies == 0 || rows == 0) return;
  const Tensor left_of = rows <= 1 || a.stride(3) == 1 ? a : torch::stable::contiguous(a);
  const Tensor right_of = columns <= 1 || b.stride(3) == 1 ? b : torch::stable::contiguous(b);
  const char* of_a = static_cast<const char*>(left_of.const_data_ptr());
  const char* of_b = static_cast<const char*>(right_of.const_data_ptr());
  double* to = static_cast<double*>(total.mutable_data_ptr());
  const int64_t bytes = a.element_size(), to_step = total.stride(0), row_step = total.stride(1);
  const int64_t a_steps[] = {left_of.stride(0), left_of.stride(1), left_of.stride(2)},
                b_steps[] = {right_of.stride(0), right_of.stride(1), right_of.stride(2)};
  const auto gram = kernels().gram[wide ? kDoubleSpectra : kFloatSpectra];
  const int64_t grain = std::max<int64_t>(1, kGrain / (n * rows * std::max<int64_t>(columns, 1)));
  torch::stable::parallel_for(0, frequencies, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(kernels().gram_scratch(rows, columns));
    for (int64_t f = begin; f < end; ++f) {
      for (int64_t first = 0; first < n; first += kDepth) {
        const Samples left{of_a + (f * a_steps[0] + first * a_steps[2]) * bytes, rows, a_steps[1], a_steps[2]};
        const Samples right{of_b + (f * b_steps[0] + first * b_steps[2]) * bytes, columns, b_steps[1], b_steps[2]};
        gram(left, right, std::min(kDepth, n - first), to + f * to_step, row_step,
             of_sums == nullptr ? nullptr : of_sums + f * rows * 2, scratch.begin);
      }
    }
  });
}

}  // namespace
}  // namespace spectra
}  // namespace fourfold

STABLE_TORCH_LIBRARY_IMPL(fourfold, CPU, m) {
  using namespace fourfold::spectra;
  m.impl("_image_spectra", TORCH_BOX(&image_spectra));
  m.impl("_spectra_gram_", TORCH_BOX(&spectra_gram));
}
