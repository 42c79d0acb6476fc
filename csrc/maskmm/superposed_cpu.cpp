// Superposed masks on CPU: checks, allocation, threads. The arithmetic is in superposed_kernels.cpp, the meaning in
// reference/maskmm_superposed.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/isa.h"
#include "maskmm/bits.h"
#include "maskmm/superposed_kernels.h"

namespace fourfold {

FOURFOLD_DECLARE_KERNELS(superposed)

namespace superposed {
namespace {

using maskmm::row_words;
using torch::stable::Tensor;

const Kernels& kernels() {
  static const Kernels& best = FOURFOLD_BEST_KERNELS(superposed);
  return best;
}

// Below this much work, in weights looked at, a second thread costs more than it brings.
constexpr int64_t kGrain = 65536;

int is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

const char* bytes_of(const Tensor& x) { return static_cast<const char*>(x.const_data_ptr()); }
char* mutable_bytes_of(const Tensor& x) { return static_cast<char*>(x.mutable_data_ptr()); }

Tensor dense(const Tensor& x) { return torch::stable::contiguous(x); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// work(first, last) over `count` units of `cost` each.
template <typename Work>
void share(int64_t count, int64_t cost, const Work& work) {
  if (count > 0) torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(cost, 1)), work);
}

// ---- masks ---------------------------------------------------------------------------------------------------------------

// The masks of a weight [n, k], checked.
struct Masks {
  const uint8_t* bits;
  int64_t tasks, n, k, words, stride;

  const uint8_t* of_task(int64_t t) const { return bits + t * stride; }

  // Whether rows [row, row + rows) of the mask at `mask` have bits set beyond k.
  bool overflow(const uint8_t* mask, int64_t row, int64_t rows) const {
    if (k % 64 == 0) return false;
    uint64_t beyond = 0;
    for (int64_t r = row; r < row + rows; ++r) {
      uint64_t last;
      std::memcpy(&last, mask + ((r + 1) * words - 1) * 8, sizeof last);
      beyond |= last >> (k % 64);
    }
    return beyond != 0;
  }
};

Masks masks_of(const char* op, const Tensor& masks, const Tensor& like, int64_t n, int64_t k) {
  require(masks.dim() == 3 && masks.size(0) >= 1 && masks.size(1) == n, op, ": masks must be [T, ", n, ", ",
          maskmm::row_bytes(k), "] with at least one mask, got ", shape_of(masks));
  maskmm::require_bits(op, "masks", masks, masks.size(0) * n, k);
  require_same_device(op, "masks", masks, like);
  const int64_t words = row_words(k);
  return {static_cast<const uint8_t*>(masks.const_data_ptr()), masks.size(0), n, k, words, n * words * 8};
}

void require_no_overflow(const char* op, const Masks& masks, bool found) {
  require(!found, op, ": masks have bits set beyond their ", masks.k, " columns, which must be zero; pack with pack_mask");
}

// ---- all masks at once ---------------------------------------------------------------------------------------------------

// What is treated at a time: whole rows, or a part of one.
struct Chunk {
  int64_t row, rows, column, words;  // words of each row
  Stretch stretch;
};

struct Chunks {
  const Masks& masks;
  int64_t rows_each, of_row, count;

  explicit Chunks(const Masks& m) : masks(m) {
    rows_each = std::max<int64_t>(1, kStretchWords / std::max<int64_t>(m.words, 1));
    of_row = ceil_div(m.words, kStretchWords);
    count = ceil_div(m.n, rows_each) * of_row;
  }

  Chunk at(int64_t i) const {
    const int64_t row = i / of_row * rows_each, first = i % of_row * kStretchWords;
    const int64_t rows = std::min(rows_each, masks.n - row), words = std::min(kStretchWords, masks.words - first);
    const uint8_t* bits = masks.bits + (row * masks.words + first) * 8;
    return {row, rows, first * 64, words, {bits, masks.stride, masks.tasks, rows * words}};
  }

  // Whether a chunk that ends its rows has bits set beyond them.
  bool overflow(const Chunk& chunk) const {
    bool found = false;
    if (masks.k % 64 == 0 || chunk.column + 64 * chunk.words < masks.k) return found;
    for (int64_t t = 0; t < masks.tasks; ++t) found |= masks.overflow(masks.of_task(t), chunk.row, chunk.rows);
    return found;
  }

  // visit(offset of a row's elements in the weight, in the chunk, their number)
  template <typename Visit>
  void for_rows(const Chunk& chunk, const Visit& visit) const {
    const int64_t n = std::min(chunk.words * 64, masks.k - chunk.column);
    for (int64_t r = 0; r < chunk.rows; ++r) visit((chunk.row + r) * masks.k + chunk.column, r * chunk.words * 64, n);
  }
};

void require_weight(const char* op, const char* name, const Tensor& weight) {
  require_floating(op, name, weight);
  require(weight.dim() == 2, op, ": ", name, " must be [N, K], got ", shape_of(weight));
}

// Errors of values name the public function, which cannot look at the bits without reading them twice.
constexpr const char* kPublic = "superposed_linear";

template <typename T>
Tensor superpose_in(const Masks& masks, const Tensor& weight, const Tensor& alpha) {
  const Chunks chunks(masks);
  Tensor out = torch::stable::new_empty(weight, {masks.n, masks.k});
  const int64_t size = weight.element_size();
  const char* from = bytes_of(weight);
  const T* factors = static_cast<const T*>(alpha.const_data_ptr());
  char* to = mutable_bytes_of(out);
  const Element element = element_of(weight);
  std::atomic<bool> overflow{false};
  share(chunks.count, kStretchWords * 64 * masks.tasks / 4, [&](int64_t first, int64_t last) {
    alignas(64) T sums[kStretchWords * 64];
    for (int64_t i = first; i < last; ++i) {
      const Chunk chunk = chunks.at(i);
      if (chunks.overflow(chunk)) overflow = true;
      std::fill_n(sums, chunk.stretch.words * 64, T{0});
      kernels().add_masks[is_double(weight)](chunk.stretch, factors, sums);
      chunks.for_rows(chunk, [&](int64_t at, int64_t in_chunk, int64_t n) {
        kernels().scale[element](from + at * size, sums + in_chunk, to + at * size, n);
      });
    }
  });
  require_no_overflow(kPublic, masks, overflow);
  return out;
}

Tensor superpose(const Tensor& weight, const Tensor& masks, const Tensor& alpha) {
  const char* op = "_superpose";
  require_weight(op, "weight", weight);
  const Masks m = masks_of(op, masks, weight, weight.size(0), weight.size(1));
  require(alpha.dim() == 1 && alpha.size(0) == m.tasks && alpha.scalar_type() == accumulate_type(weight), op,
          ": alpha must be [", m.tasks, "] in float32 (float64 for float64), got ", shape_of(alpha));
  require_same_device(op, "alpha", alpha, weight);
  const Tensor factors = dense(alpha), from = dense(weight);
  return is_double(weight) ? superpose_in<double>(m, from, factors) : superpose_in<float>(m, from, factors);
}

template <typename T>
Tensor masked_dots_in(const Masks& masks, const Tensor& a, const Tensor& b) {
  const Chunks chunks(masks);
  Tensor out = torch::stable::new_empty(a, {masks.tasks}, accumulate_type(a));
  const int64_t size = a.element_size(), tasks = masks.tasks;
  const char *of_a = bytes_of(a), *of_b = bytes_of(b);
  const Element element = element_of(a);
  // Parts of neighbouring chunks, each with totals of its own, which are added in order.
  const int64_t parts = std::min<int64_t>(chunks.count, 64);
  std::vector<double> totals(parts * tasks, 0.0);
  std::atomic<bool> overflow{false};
  share(parts, ceil_div(chunks.count, std::max<int64_t>(parts, 1)) * kStretchWords * 64 * tasks / 4,
        [&](int64_t first, int64_t last) {
          alignas(64) T products[kStretchWords * 64];
          for (int64_t part = first; part < last; ++part) {
            for (int64_t i = part * chunks.count / parts; i < (part + 1) * chunks.count / parts; ++i) {
              const Chunk chunk = chunks.at(i);
              if (chunks.overflow(chunk)) overflow = true;
              chunks.for_rows(chunk, [&](int64_t at, int64_t in_chunk, int64_t n) {
                kernels().multiply[element](of_a + at * size, of_b + at * size, products + in_chunk, n);
                std::fill(products + in_chunk + n, products + in_chunk + chunk.words * 64, T{0});
              });
              kernels().sum_masks[is_double(a)](chunk.stretch, products, totals.data() + part * tasks);
            }
          }
        });
  require_no_overflow(kPublic, masks, overflow);
  T* to = static_cast<T*>(out.mutable_data_ptr());
  for (int64_t t = 0; t < tasks; ++t) {
    double total = 0;
    for (int64_t part = 0; part < parts; ++part) total += totals[part * tasks + t];
    to[t] = static_cast<T>(total);
  }
  return out;
}

Tensor masked_dots(const Tensor& a, const Tensor& b, const Tensor& masks) {
  const char* op = "_masked_dots";
  require_weight(op, "a", a);
  require(b.scalar_type() == a.scalar_type() && b.dim() == 2 && b.size(0) == a.size(0) && b.size(1) == a.size(1), op,
          ": b must have the type and shape of a, ", shape_of(a), ", got ", shape_of(b));
  require_same_device(op, "b", b, a);
  const Masks m = masks_of(op, masks, a, a.size(0), a.size(1));
  const Tensor of_a = dense(a), of_b = dense(b);
  return is_double(a) ? masked_dots_in<double>(m, of_a, of_b) : masked_dots_in<float>(m, of_a, of_b);
}

// ---- a mask per sample ---------------------------------------------------------------------------------------------------

// The rows of a batch, each sample's one after the other, sorted by task; samples of one task keep their order.
struct Batch {
  std::vector<int64_t> rows;          // by place: which row
  std::vector<const uint8_t*> masks;  // by place: of what mask
  std::vector<Run> runs;              // of one mask, as places
  int64_t count() const { return static_cast<int64_t>(rows.size()); }
};

// x [B, .., width] and task [B].
Batch batch_of(const char* op, const char* name, const Tensor& x, int64_t width, const Tensor& task, const Masks& masks) {
  require(x.dim() >= 2 && x.size(x.dim() - 1) == width, op, ": ", name, " must be [B, .., ", width, "], got ", shape_of(x));
  const int64_t samples = x.size(0);
  require(task.scalar_type() == ScalarType::Long && task.dim() == 1 && task.size(0) == samples, op, ": task must be int64 [",
          samples, "], got ", shape_of(task));
  require_same_device(op, "task", task, x);
  int64_t rows = 1;
  for (int64_t d = 1; d + 1 < x.dim(); ++d) rows *= x.size(d);
  const Tensor ids = dense(task);
  const int64_t* of_sample = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t b = 0; b < samples; ++b) {
    require(of_sample[b] >= 0 && of_sample[b] < masks.tasks, op, ": task ids must lie in 0..", masks.tasks - 1, ", got ",
            of_sample[b], " at index ", b);
  }
  std::vector<int64_t> order(samples);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return of_sample[a] < of_sample[b]; });
  Batch batch;
  batch.rows.reserve(samples * rows);
  batch.masks.reserve(samples * rows);
  for (int64_t sample : order) {
    const uint8_t* mask = masks.of_task(of_sample[sample]);
    const int64_t place = batch.count();
    if (batch.runs.empty() || batch.runs.back().bits != mask) batch.runs.push_back({place, place, mask});
    batch.runs.back().end += rows;
    for (int64_t r = 0; r < rows; ++r) {
      batch.rows.push_back(sample * rows + r);
      batch.masks.push_back(mask);
    }
  }
  return batch;
}

void require_in_bounds(const char* op, const Masks& masks, const Batch& batch) {
  if (masks.k % 64 == 0) return;
  std::atomic<bool> overflow{false};
  share(static_cast<int64_t>(batch.runs.size()), masks.n * 8, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (masks.overflow(batch.runs[i].bits, 0, masks.n)) overflow = true;
    }
  });
  require_no_overflow(op, masks, overflow);
}

// Teams of one mask where there are as many rows of it, of different masks for the rest.
std::vector<Team> teams_of(const Batch& batch) {
  std::vector<Team> teams;
  std::vector<int64_t> rest;
  const auto add = [&](const int64_t* places, int64_t count, bool shared) {
    Team team{static_cast<int>(count), shared, {}, {}};
    for (int64_t i = 0; i < count; ++i) {
      team.rows[i] = batch.rows[places[i]];
      team.bits[i] = batch.masks[places[i]];
    }
    teams.push_back(team);
  };
  const auto add_all = [&](const std::vector<int64_t>& places, bool shared) {
    const int64_t count = static_cast<int64_t>(places.size());
    for (int64_t i = 0; i < count;) {
      const int64_t size = count - i >= kTeam ? kTeam : count - i >= 2 ? 2 : 1;
      add(places.data() + i, size, shared);
      i += size;
    }
  };
  for (const Run& run : batch.runs) {
    std::vector<int64_t> places(run.end - run.begin);
    std::iota(places.begin(), places.end(), run.begin);
    const int64_t whole = places.size() / kTeam * kTeam;
    rest.insert(rest.end(), places.begin() + whole, places.end());
    places.resize(whole);
    add_all(places, true);
  }
  add_all(rest, false);
  return teams;
}

std::vector<int64_t> sizes_with(const Tensor& x, int64_t width) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes.push_back(x.size(d));
  sizes.push_back(width);
  return sizes;
}

void require_like(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  require(t.scalar_type() == x.scalar_type(), op, ": ", name, " must be of the input's type");
  require_same_device(op, name, t, x);
}

// x in T, contiguous; x itself where it is that already.
Tensor widened(const Tensor& x) {
  const Tensor from = dense(x);
  if (x.scalar_type() == accumulate_type(x)) return from;
  Tensor out = torch::stable::new_empty(from, sizes_with(x, x.size(x.dim() - 1)), accumulate_type(x));
  constexpr int64_t kPiece = 4096;
  const int64_t n = from.numel();
  const char* in = bytes_of(from);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  share(ceil_div(n, kPiece), kPiece, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kPiece, end = std::min(n, last * kPiece);
    kernels().widen[element_of(x)](in + begin * 2, to + begin, end - begin);
  });
  return out;
}

// Teams, weight rows and columns that a thread treats at a time: what they touch stays in the second cache.
constexpr int64_t kBlockTeams = 16;
constexpr int64_t kBlockRows = 32;
constexpr int64_t kBlockColumns = 256;

Tensor task_linear(const Tensor& x, const Tensor& weight, const Tensor& masks, const Tensor& task, std::optional<Tensor> bias) {
  const char* op = "task_linear";
  require_floating(op, "x", x);
  require_weight(op, "weight", weight);
  require_like(op, "weight", weight, x);
  const int64_t n = weight.size(0), k = weight.size(1), size = x.element_size();
  const Masks m = masks_of(op, masks, x, n, k);
  const Batch batch = batch_of(op, "x", x, k, task, m);
  if (bias) {
    require_like(op, "bias", *bias, x);
    require(bias->dim() == 1 && bias->size(0) == n, op, ": bias must be [", n, "], got ", shape_of(*bias));
  }
  require_in_bounds(op, m, batch);
  const Tensor from = dense(x), w = dense(weight), b = bias ? dense(*bias) : w;
  Tensor out = torch::stable::new_empty(from, sizes_with(x, n));
  const std::vector<Team> teams = teams_of(batch);
  const int64_t team_blocks = ceil_div(static_cast<int64_t>(teams.size()), kBlockTeams), row_blocks = ceil_div(n, kBlockRows);
  const Element element = element_of(x);
  const char *of_x = bytes_of(from), *of_w = bytes_of(w), *of_bias = bias ? bytes_of(b) : nullptr;
  char* to = mutable_bytes_of(out);
  const int64_t cost = kBlockRows * k * std::min<int64_t>(batch.count(), kBlockTeams * kTeam) / 4;
  share(team_blocks * row_blocks, cost, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i % row_blocks * kBlockRows, team = i / row_blocks * kBlockTeams;
      const int64_t end = std::min<int64_t>(teams.size(), team + kBlockTeams);
      const Part part{of_w + row * k * size, std::min(kBlockRows, n - row), k, k, row * m.words * 8, m.words * 8};
      for (int64_t t = team; t < end; ++t) {
        kernels().forward[element](teams[t], part, of_x, of_bias ? of_bias + row * size : nullptr, to + row * size, n);
      }
    }
  });
  return out;
}

template <typename T>
Tensor transposed_in(const Masks& m, const Batch& batch, const Tensor& grad, const Tensor& weight, const Tensor& like) {
  const int64_t n = m.n, k = m.k, size = weight.element_size();
  Tensor out = torch::stable::new_empty(weight, sizes_with(like, k));
  const std::vector<Team> teams = teams_of(batch);
  const int64_t count = static_cast<int64_t>(teams.size());
  const int64_t team_blocks = ceil_div(count, kBlockTeams), column_blocks = ceil_div(k, kBlockColumns);
  const Element element = element_of(weight);
  const char* of_w = bytes_of(weight);
  const T* of_grad = static_cast<const T*>(grad.const_data_ptr());
  char* to = mutable_bytes_of(out);
  const int64_t cost = kBlockColumns * n * std::min<int64_t>(batch.count(), kBlockTeams * kTeam) / 4;
  share(team_blocks * column_blocks, cost, [&](int64_t first, int64_t last) {
    std::vector<T> sums(kBlockTeams * kTeam * kBlockColumns);
    for (int64_t i = first; i < last; ++i) {
      const int64_t column = i % column_blocks * kBlockColumns, team = i / column_blocks * kBlockTeams;
      const int64_t end = std::min(count, team + kBlockTeams), columns = std::min(kBlockColumns, k - column);
      std::fill(sums.begin(), sums.end(), T{0});
      // All teams of a block of weight rows before the next one; each sum takes the rows in their order all the same.
      for (int64_t row = 0; row < n; row += 2 * kBlockRows) {
        const Part part{of_w + (row * k + column) * size,
                        std::min(2 * kBlockRows, n - row),
                        columns,
                        k,
                        row * m.words * 8 + column / 8,
                        m.words * 8};
        for (int64_t t = team; t < end; ++t) {
          kernels().backward[element](teams[t], part, of_grad + row, n, sums.data() + (t - team) * kTeam * kBlockColumns,
                                      kBlockColumns);
        }
      }
      for (int64_t t = team; t < end; ++t) {
        for (int r = 0; r < teams[t].count; ++r) {
          kernels().narrow[element](sums.data() + ((t - team) * kTeam + r) * kBlockColumns,
                                    to + (teams[t].rows[r] * k + column) * size, columns);
        }
      }
    }
  });
  return out;
}

Tensor task_linear_transposed(const Tensor& grad, const Tensor& weight, const Tensor& masks, const Tensor& task) {
  const char* op = "_task_linear_transposed";
  require_floating(op, "grad", grad);
  require_weight(op, "weight", weight);
  require_like(op, "weight", weight, grad);
  const Masks m = masks_of(op, masks, grad, weight.size(0), weight.size(1));
  const Batch batch = batch_of(op, "grad", grad, m.n, task, m);
  require_in_bounds(op, m, batch);
  const Tensor g = widened(grad), w = dense(weight);
  return is_double(grad) ? transposed_in<double>(m, batch, g, w, grad) : transposed_in<float>(m, batch, g, w, grad);
}

// Rows of samples that are treated at a time, and columns: their part of x is copied side by side.
constexpr int64_t kOuterPlaces = 64;
constexpr int64_t kOuterColumns = 128;

template <typename T>
Tensor outer_in(const Masks& m, const Batch& batch, const Tensor& grad, const Tensor& x) {
  const int64_t n = m.n, k = m.k, size = x.element_size(), places = batch.count();
  Tensor out = torch::stable::new_empty(x, {n, k});
  const Element element = element_of(x);
  const T* of_grad = static_cast<const T*>(grad.const_data_ptr());
  const char* of_x = bytes_of(x);
  char* to = mutable_bytes_of(out);
  // The runs of each block of places.
  std::vector<std::vector<Run>> blocks(ceil_div(places, kOuterPlaces));
  for (const Run& run : batch.runs) {
    for (int64_t begin = run.begin; begin < run.end;) {
      const int64_t block = begin / kOuterPlaces, end = std::min(run.end, (block + 1) * kOuterPlaces);
      blocks[block].push_back({begin - block * kOuterPlaces, end - block * kOuterPlaces, run.bits});
      begin = end;
    }
  }
  const int64_t row_blocks = ceil_div(n, kBlockRows), column_blocks = ceil_div(k, kOuterColumns);
  share(row_blocks * column_blocks, kBlockRows * kOuterColumns * (places + 1) / 4, [&](int64_t first, int64_t last) {
    std::vector<T> sums(kBlockRows * kOuterColumns), of_rows(kBlockRows * kOuterPlaces),
        of_columns(kOuterPlaces * kOuterColumns, T{0});
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / column_blocks * kBlockRows, column = i % column_blocks * kOuterColumns;
      const int64_t rows = std::min(kBlockRows, n - row), columns = std::min(kOuterColumns, k - column);
      // Whole words of columns: what lies beyond k has no bits.
      const Part part{nullptr, rows, row_words(columns) * 64, kOuterColumns, row * m.words * 8 + column / 8, m.words * 8};
      std::fill(sums.begin(), sums.end(), T{0});
      for (int64_t block = 0; block < static_cast<int64_t>(blocks.size()); ++block) {
        const int64_t begin = block * kOuterPlaces, count = std::min(kOuterPlaces, places - begin);
        for (int64_t p = 0; p < count; ++p) {
          const int64_t from = batch.rows[begin + p];
          kernels().widen[element](of_x + (from * k + column) * size, of_columns.data() + p * kOuterColumns, columns);
          for (int64_t r = 0; r < rows; ++r) of_rows[r * kOuterPlaces + p] = of_grad[from * n + row + r];
        }
        kernels().outer[is_double(x)](blocks[block].data(), blocks[block].size(), part, of_rows.data(), kOuterPlaces,
                                      of_columns.data(), sums.data());
      }
      for (int64_t r = 0; r < rows; ++r) {
        kernels().narrow[element](sums.data() + r * kOuterColumns, to + ((row + r) * k + column) * size, columns);
      }
    }
  });
  return out;
}

Tensor task_outer(const Tensor& grad, const Tensor& x, const Tensor& masks, const Tensor& task) {
  const char* op = "_task_outer";
  require_floating(op, "grad", grad);
  require_floating(op, "x", x);
  require_like(op, "x", x, grad);
  require(grad.dim() >= 2 && x.dim() == grad.dim(), op, ": grad [B, .., N] and x [B, .., K] must have as many dimensions, got ",
          shape_of(grad), " and ", shape_of(x));
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    require(x.size(d) == grad.size(d), op, ": grad [B, .., N] and x [B, .., K] must be of one batch, got ", shape_of(grad),
            " and ", shape_of(x));
  }
  const int64_t last = x.dim() - 1;
  const Masks m = masks_of(op, masks, x, grad.size(last), x.size(last));
  const Batch batch = batch_of(op, "x", x, m.k, task, m);
  require_in_bounds(op, m, batch);
  const Tensor g = widened(grad), from = dense(x);
  return is_double(x) ? outer_in<double>(m, batch, g, from) : outer_in<float>(m, batch, g, from);
}

}  // namespace
}  // namespace superposed
}  // namespace fourfold

STABLE_TORCH_LIBRARY_IMPL(fourfold, CPU, m) {
  using namespace fourfold::superposed;
  m.impl("_superpose", TORCH_BOX(&superpose));
  m.impl("_masked_dots", TORCH_BOX(&masked_dots));
  m.impl("task_linear", TORCH_BOX(&task_linear));
  m.impl("_task_linear_transposed", TORCH_BOX(&task_linear_transposed));
  m.impl("_task_outer", TORCH_BOX(&task_outer));
}
