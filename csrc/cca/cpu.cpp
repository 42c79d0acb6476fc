// The internal ops of representation similarity on CPU: checks, geometry, threads. The arithmetic is in kernels.cpp, the
// meaning in reference/cca_ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "cca/kernels.h"
#include "common/checks.h"
#include "common/isa.h"

namespace fourfold {

FOURFOLD_DECLARE_KERNELS(cca)

namespace cca {
namespace {

using torch::stable::Tensor;

const Kernels& kernels() {
  static const Kernels& best = FOURFOLD_BEST_KERNELS(cca);
  return best;
}

// Below this much work, in elements, a second thread costs more than it brings.
constexpr int64_t kGrain = 32768;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// work(first, last) over `count` units of `cost` each.
template <typename Work>
void share(int64_t count, int64_t cost, const Work& work) {
  if (count > 0) torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(cost, 1)), work);
}

// ---- memory --------------------------------------------------------------------------------------------------------------

// The bytes that a tensor's elements lie in: rows of `width`, one every `pitch`; or all between the first and the last.
struct Extent {
  const char *begin, *end;
  int64_t pitch, width;
};

Extent extent_of(const Tensor& t) {
  const char* begin = static_cast<const char*>(t.const_data_ptr());
  const int64_t size = t.element_size();
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 0) return {begin, begin, 0, 0};
    last += (t.size(d) - 1) * t.stride(d);
  }
  const bool rows = t.dim() == 2 && t.size(0) > 1 && (t.size(1) == 1 || t.stride(1) == 1);
  const bool column = t.dim() == 1 && t.size(0) > 1;
  const int64_t pitch = rows || column ? t.stride(0) * size : 0, width = (rows ? t.size(1) : 1) * size;
  return {begin, begin + (last + 1) * size, pitch, width};
}

// Whether they may share memory: columns of one matrix are known not to.
bool overlap(const Tensor& a, const Tensor& b) {
  const Extent x = extent_of(a), y = extent_of(b);
  if (x.begin == x.end || y.begin == y.end || x.end <= y.begin || y.end <= x.begin) return false;
  if (x.pitch <= 0 || x.pitch != y.pitch) return true;
  const int64_t apart = ((y.begin - x.begin) % x.pitch + x.pitch) % x.pitch;
  return apart < x.width || apart + y.width > x.pitch;
}

void require_apart(const char* op, const char* name, const Tensor& written, const char* other_name, const Tensor& other) {
  require(!overlap(written, other), op, ": ", name, " must not share memory with ", other_name);
}

// Written in rows of contiguous elements that don't share memory.
bool has_rows(const Tensor& t) {
  return (t.size(1) <= 1 || t.stride(1) == 1) && (t.size(0) <= 1 || t.stride(0) >= std::max<int64_t>(t.size(1), 1));
}

// ---- samples -------------------------------------------------------------------------------------------------------------

// x [N, C, S]; sample n * S + s. Steps in elements.
struct Activations {
  const char* data;
  Element element;
  int64_t bytes;  // of an element
  int64_t images, channels, samples;
  int64_t image_step, channel_step, sample_step;

  int64_t count() const { return images * samples; }

  bool in_one() const { return images == 1 || samples == 1 || image_step == samples * sample_step; }
  // As one image of all samples, where their steps allow.
  void merge() {
    if (samples == 1 && images > 1) sample_step = image_step;
    samples *= images;
    images = 1;
  }

  Samples at(int64_t image, int64_t sample, int64_t wanted) const {
    return {data + (image * image_step + sample * sample_step) * bytes, channels, wanted, channel_step, sample_step};
  }
};

Activations activations_of(const char* op, const char* name, const Tensor& x) {
  require_floating(op, name, x);
  require(x.is_cpu() && x.dim() == 3, op, ": ", name, " must be [N, C, S] on the CPU, got ", shape_of(x));
  Activations a{static_cast<const char*>(x.const_data_ptr()),
                element_of(x),
                static_cast<int64_t>(x.element_size()),
                x.size(0),
                x.size(1),
                x.size(2),
                x.stride(0),
                x.stride(1),
                x.stride(2)};
  int64_t count = 0;
  require(!__builtin_mul_overflow(a.images, a.samples, &count), op, ": ", name, " has too many samples, got ", shape_of(x));
  if (a.channels == 1) a.channel_step = 0;  // whatever it is said to be
  return a;
}

// visit(image, its first sample, how many) for the images' parts of samples [first, last).
template <typename Visit>
void for_images(const Activations& x, int64_t first, int64_t last, const Visit& visit) {
  while (first < last) {
    const int64_t image = first / x.samples, sample = first % x.samples;
    const int64_t count = std::min(x.samples - sample, last - first);
    visit(image, sample, count);
    first += count;
  }
}

// ---- packing -------------------------------------------------------------------------------------------------------------

// Elements that are packed at a time, with sums of their own, and the fewest samples.
constexpr int64_t kPackElements = 65536;
constexpr int64_t kPackSamples = 64;

void pack_samples(const Tensor& x, const Tensor& pivot, int64_t first, Tensor panel, Tensor sums, Tensor norms) {
  const char* op = "_pack_samples";
  Activations from = activations_of(op, "x", x);
  const int64_t channels = from.channels, total = from.count();
  require(pivot.is_cpu() && pivot.scalar_type() == ScalarType::Double && pivot.dim() == 1 && pivot.size(0) == channels, op,
          ": pivot must be [", channels, "] in float64, got ", shape_of(pivot));
  const bool wide = panel.scalar_type() == ScalarType::Double;
  require(panel.is_cpu() && (wide || panel.scalar_type() == ScalarType::Float) && panel.dim() == 2 && panel.size(1) == channels,
          op, ": panel must be [K, ", channels, "] in float32 or float64, got ", shape_of(panel));
  require(has_rows(panel), op, ": panel must have contiguous rows that don't overlap");
  const int64_t rows = panel.size(0);
  require(first >= 0 && rows <= total && first <= total - rows, op, ": samples ", first, " to ", first, " + ", rows,
          " must lie within x, which has ", total);
  require(sums.is_cpu() && sums.scalar_type() == ScalarType::Double && sums.dim() == 1 && sums.size(0) == channels + 1 &&
              sums.is_contiguous(),
          op, ": sums must be contiguous [", channels + 1, "] in float64, got ", shape_of(sums));
  require(norms.is_cpu() && norms.scalar_type() == panel.scalar_type() && norms.dim() == 1 && norms.size(0) == rows, op,
          ": norms must be [", rows, "] in the panel's type, got ", shape_of(norms));
  require(rows <= 1 || norms.stride(0) > 0, op, ": norms must not be an expanded tensor, whose elements share memory");
  for (const auto& [name, written] :
       {std::pair<const char*, const Tensor&>{"panel", panel}, {"sums", sums}, {"norms", norms}}) {
    require_apart(op, name, written, "x", x);
    require_apart(op, name, written, "pivot", pivot);
  }
  require_apart(op, "panel", panel, "sums", sums);
  require_apart(op, "panel", panel, "norms", norms);
  require_apart(op, "sums", sums, "norms", norms);
  if (rows == 0) return;
  if (from.in_one()) from.merge();
  const Tensor shift = torch::stable::contiguous(pivot);
  const double* of_pivot = static_cast<const double*>(shift.const_data_ptr());
  const auto pack = kernels().pack[from.element][wide ? kDoublePanel : kFloatPanel];
  char* to = static_cast<char*>(panel.mutable_data_ptr());
  char* of_norms = static_cast<char*>(norms.mutable_data_ptr());
  const int64_t bytes = panel.element_size(), row_step = panel.stride(0), norm_step = norms.stride(0);
  // The samples of a part don't depend on the number of threads, and the parts' sums are added in order: neither does the
  // result.
  const int64_t part = std::max(kPackSamples, kPackElements / std::max<int64_t>(channels, 1) / 16 * 16);
  const int64_t parts = ceil_div(rows, part), width = channels + 1;
  std::vector<double> found(parts * width, 0.0);
  share(parts, part * width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t row = i * part;
      for_images(from, first + row, first + std::min(rows, row + part), [&](int64_t image, int64_t sample, int64_t count) {
        const Rows place{to + row * row_step * bytes, row_step, of_norms + row * norm_step * bytes, norm_step};
        pack(from.at(image, sample, count), of_pivot, place, found.data() + i * width);
        row += count;
      });
    }
  });
  double* of_sums = static_cast<double*>(sums.mutable_data_ptr());
  for (int64_t c = 0; c < width; ++c) {
    double sum = 0;
    for (int64_t i = 0; i < parts; ++i) sum += found[i * width + c];
    of_sums[c] += sum;
  }
}

// ---- sums and counts -----------------------------------------------------------------------------------------------------

void add_wide(Tensor total, const Tensor& part) {
  const char* op = "_add_wide_";
  require(total.is_cpu() && total.scalar_type() == ScalarType::Double && total.dim() == 2 && has_rows(total), op,
          ": total must be [R, W] in float64 with contiguous rows that don't overlap, got ", shape_of(total));
  const int64_t rows = total.size(0), width = total.size(1);
  require(part.is_cpu() && part.scalar_type() == ScalarType::Float && part.dim() == 2 && part.size(0) == rows &&
              part.size(1) == width,
          op, ": part must be [", rows, ", ", width, "] in float32, got ", shape_of(part));
  require_apart(op, "total", total, "part", part);
  const Tensor source = width <= 1 || part.stride(1) == 1 ? part : torch::stable::contiguous(part);
  double* to = static_cast<double*>(total.mutable_data_ptr());
  const float* from = static_cast<const float*>(source.const_data_ptr());
  const int64_t to_step = total.stride(0), from_step = source.stride(0);
  share(width > 0 ? rows : 0, width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) kernels().add_wide(to + r * to_step, from + r * from_step, width);
  });
}

Tensor count_nonfinite(const Tensor& x) {
  const char* op = "_count_nonfinite";
  require_floating(op, "x", x);
  require(x.is_cpu(), op, ": x must be on the CPU");
  Tensor result = torch::stable::new_empty(x, {}, ScalarType::Long);
  // Dimensions of more than one element, the one with the largest step first; neighbours that go on in the same step are one.
  struct Dimension {
    int64_t size, step;
  };
  std::vector<Dimension> order, dims;
  int64_t copies = 1;  // of each element of an expanded tensor
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) == 1) continue;
    if (x.stride(d) == 0 || x.size(d) == 0) {
      copies *= x.size(d);
    } else {
      order.push_back({x.size(d), x.stride(d)});
    }
  }
  std::stable_sort(order.begin(), order.end(), [](const Dimension& a, const Dimension& b) { return a.step > b.step; });
  for (const Dimension& d : order) {
    if (!dims.empty() && dims.back().step == d.size * d.step) {
      dims.back() = {dims.back().size * d.size, d.step};
    } else {
      dims.push_back(d);
    }
  }
  std::atomic<int64_t> total{0};
  if (copies > 0) {
    if (dims.empty()) dims.push_back({1, 1});
    const Dimension inner = dims.back();
    dims.pop_back();
    int64_t rows = 1;
    for (const Dimension& d : dims) rows *= d.size;
    constexpr int64_t kPiece = 65536;
    const int64_t pieces = ceil_div(inner.size, kPiece), bytes = x.element_size();
    const auto count = kernels().count_nonfinite[element_of(x)];
    const char* data = static_cast<const char*>(x.const_data_ptr());
    share(rows * pieces, std::min(inner.size, kPiece), [&](int64_t begin, int64_t end) {
      int64_t found = 0;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % pieces * kPiece;
        int64_t offset = first * inner.step, rest = i / pieces;
        for (auto d = dims.rbegin(); d != dims.rend(); ++d) {
          offset += rest % d->size * d->step;
          rest /= d->size;
        }
        found += count(data + offset * bytes, std::min(kPiece, inner.size - first), inner.step);
      }
      total += found;
    });
  }
  *static_cast<int64_t*>(result.mutable_data_ptr()) = total * copies;
  return result;
}

// ---- products ------------------------------------------------------------------------------------------------------------

// Samples that are summed in float32 before they are added to the total. Squares of bfloat16 round to the same side more often
// than not, so that their sum's error grows with this; 1024 is the most that is promised.
constexpr int64_t kDepth = 256;
constexpr int64_t kCacheLine = 64;
// Of packed samples at a time, unless they are fewer than kDepth.
constexpr int64_t kPackedBytes = int64_t{1} << 19;

// A part of an image, and its first step in the packed blocks.
struct Part {
  int64_t image, sample, count, step;
};

// What is packed at a time: its parts, and the steps after which sums go to the total.
struct Group {
  std::vector<Part> parts;
  std::vector<int64_t> ends;
  int64_t steps = 0;

  // Each part, of an image and of kDepth samples, may leave its last step half empty.
  static int64_t most_steps(int64_t count, int64_t of_image, int64_t per_step) {
    return per_step == 1 ? count : count / 2 + count / of_image + count / kDepth + 3;
  }

  Group(const Activations& x, int64_t first, int64_t last, int64_t per_step) {
    for (int64_t begin = first; begin < last; begin += kDepth) {
      for_images(x, begin, std::min(last, begin + kDepth), [&](int64_t image, int64_t sample, int64_t count) {
        parts.push_back({image, sample, count, steps});
        steps += ceil_div(count, per_step);
      });
      ends.push_back(steps);
    }
  }
};

// The blocks of an operand, packed.
struct Packed {
  const Activations& x;
  int64_t blocks, capacity, step_bytes;  // capacity: steps of a block
  std::unique_ptr<char[]> memory;
  char* first;  // where a cache line begins

  Packed(const Activations& from, int64_t steps)
      : x(from), blocks(ceil_div(from.channels, kBlock)), capacity(steps), step_bytes(cca::step_bytes(from.element)) {
    memory.reset(new char[blocks * capacity * step_bytes + kCacheLine]);
    first = memory.get() + (kCacheLine - reinterpret_cast<uintptr_t>(memory.get()) % kCacheLine);
  }

  char* at(int64_t block, int64_t step) const { return first + (block * capacity + step) * step_bytes; }

  void fill(const Group& group) const {
    const auto pack = kernels().pack_block[x.element];
    share(blocks, group.steps * kBlock, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t channel = block * kBlock;
        for (const Part& part : group.parts) {
          Samples samples = x.at(part.image, part.sample, part.count);
          samples.data = static_cast<const char*>(samples.data) + channel * x.channel_step * x.bytes;
          samples.channels = std::min(kBlock, x.channels - channel);
          pack(samples, at(block, part.step));
        }
      }
    });
  }
};

void gram(const Tensor& x, const Tensor& y, Tensor total) {
  const char* op = "_gram_";
  Activations a = activations_of(op, "x", x), b = activations_of(op, "y", y);
  require(x.scalar_type() == y.scalar_type(), op, ": y must be of x's type");
  require(a.images == b.images && a.samples == b.samples, op, ": x [N, C, S] and y must have the same samples, got ",
          shape_of(x), " and ", shape_of(y));
  require(total.is_cpu() && total.scalar_type() == ScalarType::Double && total.dim() == 2 && total.size(0) == a.channels &&
              total.size(1) == b.channels && has_rows(total),
          op, ": total must be [", a.channels, ", ", b.channels, "] in float64 with contiguous rows that don't overlap, got ",
          shape_of(total));
  require_apart(op, "total", total, "x", x);
  require_apart(op, "total", total, "y", y);
  if (total.numel() == 0 || a.count() == 0) return;
  const bool symmetric = a.data == b.data && a.channels == b.channels && a.image_step == b.image_step &&
                         a.channel_step == b.channel_step && a.sample_step == b.sample_step;
  if (a.in_one() && b.in_one()) a.merge(), b.merge();
  const int64_t per_step = kernels().samples_per_step[a.element], count = a.count();
  const int64_t blocks = ceil_div(a.channels, kBlock) + (symmetric ? 0 : ceil_div(b.channels, kBlock));
  const int64_t together = std::max<int64_t>(1, kPackedBytes * per_step / (blocks * step_bytes(a.element)) / kDepth) * kDepth;
  const int64_t capacity = Group::most_steps(std::min(together, count), a.samples, per_step);
  const Packed of_a(a, capacity);
  const Packed of_b(b, symmetric ? 0 : capacity);
  const Packed& right = symmetric ? of_a : of_b;
  const auto add_tile = kernels().add_tile[a.element];
  double* to = static_cast<double*>(total.mutable_data_ptr());
  const int64_t row_step = total.stride(0);
  // Squares of tiles that a thread computes at a time: the blocks they need stay in its second cache.
  int64_t side = 8;
  const int64_t threads = torch::stable::get_num_threads();
  const auto squares = [&] { return ceil_div(of_a.blocks, side) * ceil_div(right.blocks, side); };
  while (threads > 1 && side > 1 && squares() < 4 * threads) side /= 2;
  const int64_t across = ceil_div(right.blocks, side);
  for (int64_t first = 0; first < count; first += together) {
    const Group group(a, first, std::min(count, first + together), per_step);
    of_a.fill(group);
    if (!symmetric) of_b.fill(group);
    share(squares(), side * side * kBlock * kBlock * group.steps / 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / across * side, column = i % across * side;
        const int64_t last_row = std::min(of_a.blocks, row + side), last_column = std::min(right.blocks, column + side);
        int64_t step = 0;
        for (const int64_t until : group.ends) {
          for (int64_t r = row; r < last_row; ++r) {
            for (int64_t c = symmetric ? std::max(r, column) : column; c < last_column; ++c) {
              add_tile(of_a.at(r, step), right.at(c, step), until - step, to + (r * row_step + c) * kBlock, row_step,
                       std::min(kBlock, a.channels - r * kBlock), std::min(kBlock, b.channels - c * kBlock));
            }
          }
          step = until;
        }
      }
    });
  }
}

}  // namespace
}  // namespace cca
}  // namespace fourfold

STABLE_TORCH_LIBRARY_IMPL(fourfold, CPU, m) {
  using namespace fourfold::cca;
  m.impl("_pack_samples", TORCH_BOX(&pack_samples));
  m.impl("_add_wide_", TORCH_BOX(&add_wide));
  m.impl("_count_nonfinite", TORCH_BOX(&count_nonfinite));
  m.impl("_gram_", TORCH_BOX(&gram));
}
