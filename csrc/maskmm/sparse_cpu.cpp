// Sparse weights on CPU: checks, allocation, and how the work is cut for caches and threads. The arithmetic is in
// sparse_kernels.cpp. Every result is summed up by one thread in one order, so that it doesn't depend on their number.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/isa.h"
#include "maskmm/bits.h"
#include "maskmm/sparse_kernels.h"

namespace fourfold {

FOURFOLD_DECLARE_KERNELS(sparse)

namespace sparse {
namespace {

using maskmm::require_bits;
using maskmm::row_bytes;
using maskmm::row_words;
using maskmm::Rows;
using maskmm::rows_of;
using torch::stable::Tensor;

// What low 16 bits of a column can tell apart.
constexpr int64_t kBlock = 65536;
constexpr int64_t kNarrowestSlab = 64;
// Multiplications that are worth a thread; bytes of bits, or values, that are.
constexpr int64_t kGrain = 32768;
// Totals of a block of rows stay in the first-level cache, or near it; so do the columns that are found for a block of rows.
constexpr int64_t kTotalBytes = 32768, kDecodedRows = 32, kDecodedColumns = int64_t{1} << 18;
// Elements between rows of x, whose length alone would often put all of them into one place of a cache.
constexpr int64_t kPitchMore = 128;
// Pieces of rows whose columns are found from the bits.
constexpr int64_t kDecodedSlab = 128;
// A tile that is added to, and the part of b that sddmm reads for a block of rows, stay in the second.
constexpr int64_t kScatteredBytes = 131072, kDotBytes = 262144;

const Kernels& kernels() {
  static const Kernels& best = FOURFOLD_BEST_KERNELS(sparse);
  return best;
}

int64_t rounded_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

int64_t power_of_two(int64_t least) {
  int64_t power = 1;
  while (power < least) power *= 2;
  return power;
}

// Memory that is aligned for vectors. A thread keeps some from one call to the next.
class Scratch {
 public:
  explicit Scratch(const char* op) : op_(op) {}
  // Bytes that `at` will find later.
  size_t reserve(int64_t bytes) {
    const size_t here = size_;
    size_ += static_cast<size_t>(rounded_up(bytes, 64));
    return here;
  }
  void allocate() {
    thread_local std::unique_ptr<char, decltype(&std::free)> kept(nullptr, &std::free);
    thread_local size_t kept_size = 0;
    constexpr size_t kMostKept = size_t{64} << 20;
    if (size_ <= kept_size) {
      start_ = kept.get();
      return;
    }
    std::unique_ptr<char, decltype(&std::free)> fresh(static_cast<char*>(std::aligned_alloc(64, size_)), &std::free);
    if (fresh == nullptr) {
      throw std::runtime_error(std::string(op_) + ": out of memory: cannot allocate scratch memory on the CPU");
    }
    start_ = fresh.get();
    if (size_ <= kMostKept) {
      kept = std::move(fresh);
      kept_size = size_;
    } else {
      own_ = std::move(fresh);
    }
  }
  char* at(size_t place) const { return start_ + place; }

 private:
  const char* op_;
  size_t size_ = 0;
  char* start_ = nullptr;
  std::unique_ptr<char, decltype(&std::free)> own_{nullptr, &std::free};
};

// Threads for so much work, no more than there are.
int64_t parts_for(int64_t work) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::clamp<int64_t>(work / kGrain, 1, threads);
}

template <typename Function>
void in_parts(int64_t parts, const Function& function) {
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) function(part);
  });
}

// ---- what a sparse weight is ---------------------------------------------------------------------------------------------

enum class Format { bitmap, csr16, slab };

struct Weight {
  const char* op;
  Format format;
  int64_t n, k, nnz;
  int64_t pieces, slab;  // of a row; slab columns each
  Tensor values, bits, starts, columns;

  const uint8_t* bits_data() const { return static_cast<const uint8_t*>(bits.const_data_ptr()); }
  const int64_t* starts_data() const { return static_cast<const int64_t*>(starts.const_data_ptr()); }
  const char* values_data() const { return static_cast<const char*>(values.const_data_ptr()); }
  const uint16_t* columns_data() const {
    return format == Format::bitmap ? nullptr : static_cast<const uint16_t*>(columns.const_data_ptr());
  }
  // Where row n begins in values.
  int64_t row_start(int64_t row) const { return std::clamp<int64_t>(starts_data()[row * pieces], 0, nnz); }

  // Rows [bound(part), bound(part + 1)) have about as many values as those of any other part.
  int64_t bound(int64_t part, int64_t parts) const {
    if (part == 0 || part == parts) return part == 0 ? 0 : n;
    // A row costs something for itself.
    const auto cost = [&](int64_t row) { return row_start(row) + 16 * row; };
    const int64_t wanted = cost(n) / parts * part;
    int64_t low = 0, high = n;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      cost(middle) < wanted ? low = middle + 1 : high = middle;
    }
    return low;
  }
};

// A slab of at least 64 columns, a power of two, or of all of them.
int64_t pieces_of(const char* op, int64_t k, int64_t slab) {
  require(slab >= std::max<int64_t>(k, 1) || (slab >= kNarrowestSlab && (slab & (slab - 1)) == 0), op,
          ": slab must be a power of two from ", kNarrowestSlab, " on, or at least k, got ", slab, " for k ", k);
  return k == 0 ? 0 : (k - 1) / slab + 1;
}

Weight describe(const char* op, const Tensor& x, const Tensor& values, const Tensor& bits, const Tensor& starts,
                const std::optional<Tensor>& columns, int64_t k, const std::string& format) {
  Weight w{op, Format::bitmap, 0, k, 0, 0, 0, values, bits, starts, columns ? *columns : bits};
  require(format == "bitmap" || format == "csr16" || format == "slab", op,
          ": format must be 'bitmap', 'csr16' or 'slab', got '", format, "'");
  w.format = format == "bitmap" ? Format::bitmap : format == "csr16" ? Format::csr16 : Format::slab;
  require_floating(op, "values", values);
  require(values.dim() == 1, op, ": values must be [nnz], got ", shape_of(values));
  require(values.scalar_type() == x.scalar_type(), op, ": values must have the dtype of the other matrix");
  require(bits.dim() == 2, op, ": bits must be [N, 8 * ceil(K / 64)], got ", shape_of(bits));
  w.n = bits.size(0), w.nnz = values.size(0);
  require_bits(op, "bits", bits, w.n, k);
  w.values = torch::stable::contiguous(values);
  require(starts.scalar_type() == ScalarType::Long && starts.dim() == 1 && starts.is_contiguous(), op,
          ": starts must be contiguous int64 [N * S + 1]");
  const int64_t count = starts.size(0) - 1;
  w.pieces = w.n == 0 ? (k > 0) : count / w.n;
  require(count == (w.n == 0 ? 0 : w.n * w.pieces) && (w.pieces > 0) == (k > 0), op, ": starts of ", w.n,
          " rows must have a multiple of that and one more, got ", starts.size(0));
  w.slab = w.pieces <= 1 ? std::max<int64_t>(k, 1) : kNarrowestSlab;
  while (w.pieces > 1 && w.slab * w.pieces < k) w.slab *= 2;
  require(w.pieces <= 1 || (k - 1) / w.slab + 1 == w.pieces, op, ": no slab, a power of two from ", kNarrowestSlab,
          " on, gives ", w.pieces, " pieces of ", k, " columns");
  require(w.format == Format::slab || w.pieces <= 1, op, ": format '", format, "' has one start a row, got ", w.pieces);
  const int64_t* const data = w.starts_data();
  bool ascend = data[0] == 0 && data[count] == w.nnz;
  for (int64_t i = 0; i < count; ++i) ascend &= data[i] <= data[i + 1];
  require(ascend, op, ": starts must ascend from 0 to ", w.nnz, ", the number of values");
  if (w.format == Format::bitmap) return w;
  require(std::min(w.slab, k) <= kBlock, op, ": format '", format, "' needs pieces of at most 65536 columns, got ", k,
          w.format == Format::csr16 ? "; use 'slab'" : "; give a slab to _mask_starts");
  require(columns && columns->scalar_type() == ScalarType::Short && columns->dim() == 1 && columns->size(0) == w.nnz &&
              columns->is_contiguous(),
          op, ": columns must be contiguous int16 [", w.nnz, "] for format '", format, "'");
  return w;
}

// All dimensions but the last as one.
int64_t batch_of(const Tensor& x) {
  int64_t batch = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) batch *= x.size(d);
  return batch;
}

Tensor result_of(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes.push_back(x.size(d));
  sizes.push_back(last);
  return torch::stable::new_empty(x, sizes);
}

// ---- batches in tiles ----------------------------------------------------------------------------------------------------

int width_index(int64_t batch) {
  int index = 0;
  while (index + 1 < kWidthCount && kWidths[index] < batch) ++index;
  return index;
}

struct Tile {
  int64_t first, batch;
  int index;  // of its width
  int64_t width;
  size_t memory;  // in scratch
};

// The batch in tiles of `rows` rows of at most `widest`; element_bytes: by index of the width.
std::vector<Tile> tiles_of(int64_t batch, int64_t widest, int64_t rows, const int* element_bytes, Scratch& scratch) {
  std::vector<Tile> tiles;
  for (int64_t first = 0; first < batch;) {
    const int64_t some = std::min(widest, batch - first);
    const int index = width_index(some);
    const int64_t width = kWidths[index];
    tiles.push_back({first, some, index, width, scratch.reserve(rows * width * element_bytes[index])});
    first += some;
  }
  return tiles;
}

void pack_tiles(const Pack (&pack)[kWidthCount], const std::vector<Tile>& tiles, const Scratch& scratch, const void* x,
                int64_t element_bytes, int64_t k) {
  constexpr int64_t kColumns = 256;
  const int64_t chunks = (k + kColumns - 1) / kColumns, units = chunks * static_cast<int64_t>(tiles.size());
  torch::stable::parallel_for(0, units, kGrain / (kColumns * tiles[0].width) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const Tile& tile = tiles[unit / chunks];
      const int64_t first = unit % chunks * kColumns;
      pack[tile.index](static_cast<const char*>(x) + tile.first * k * element_bytes, k, tile.batch, first,
                       std::min(first + kColumns, k), scratch.at(tile.memory));
    }
  });
}

// With narrow slabs a piece of the widest tile stays in the first-level cache; a whole tile of half that in the second.
int64_t widest_tile(Element element, int64_t slab) { return element == kDouble || slab > 512 ? 32 : 64; }

// Rows of a tile over k columns, so many that a column held to 16 bits, and to them, is one of its rows.
int64_t tile_rows(int64_t k) { return k <= kBlock ? power_of_two(k) : rounded_up(k, kBlock); }
uint32_t column_mask(int64_t rows) { return static_cast<uint32_t>(std::min(rows, kBlock) - 1); }

// ---- x @ W.T + bias ------------------------------------------------------------------------------------------------------

struct Product {
  const Weight& weight;
  Element element;
  int64_t accumulate_bytes, element_bytes;
  const void* bias;
  Tensor y;

  char* y_at(int64_t m, int64_t row) const {
    return static_cast<char*>(y.mutable_data_ptr()) + (m * weight.n + row) * element_bytes;
  }
};

void from_bits(const Product& p, const char* x, int64_t batch) {
  const Weight& w = p.weight;
  const int64_t words = row_words(w.k), pitch = 64 * words + kPitchMore, bytes = kernels().bitmap_x_bytes[p.element];
  const int64_t rows = power_of_two(batch);
  Scratch scratch(w.op);
  scratch.reserve(rows * pitch * bytes);
  scratch.allocate();
  if (rows > batch) std::memset(scratch.at(batch * pitch * bytes), 0, static_cast<size_t>((rows - batch) * pitch * bytes));
  for (int64_t m = 0; m < batch; ++m) {
    kernels().bitmap_x[p.element](x + m * w.k * p.element_bytes, w.k, scratch.at(m * pitch * bytes), pitch);
  }
  const BitmapJob job{w.bits_data(), words, w.values_data(), w.starts_data(),        w.nnz, scratch.at(0),
                      pitch,         batch, p.bias,          p.y.mutable_data_ptr(), w.n};
  const int64_t parts = parts_for(w.n * w.k * batch / 4);
  in_parts(parts, [&](int64_t part) { kernels().bitmap[p.element](job, w.bound(part, parts), w.bound(part + 1, parts)); });
}

// The nonzeros of a block of rows, with their columns found again from the bits, in memory of the caller.
struct Decoded {
  int64_t rows;  // at most
  int64_t slab, pieces;
  int64_t column_bytes, bytes;

  Decoded(const Weight& w, int64_t slab_) : slab(std::min(rounded_up(w.k, 64), slab_)), pieces((w.k - 1) / slab + 1) {
    rows = std::clamp<int64_t>(kDecodedColumns / w.k, 1, kDecodedRows);
    column_bytes = rounded_up((rows * 64 * row_words(w.k) + 64) * 2, 64);
    bytes = column_bytes + rounded_up((rows * pieces + 1) * 8, 64);
  }

  // Rows first .. first + some, numbered from 0.
  Nonzeros decode(const Weight& w, int64_t first, int64_t some, int64_t value_bytes, char* memory) const {
    uint16_t* const columns = reinterpret_cast<uint16_t*>(memory);
    int64_t* const starts = reinterpret_cast<int64_t*>(memory + column_bytes);
    const int64_t words = row_words(w.k), piece_words = slab / 64, base = w.row_start(first);
    int64_t at = 0;
    for (int64_t row = 0; row < some; ++row) {
      const uint8_t* bits = w.bits_data() + (first + row) * words * 8;
      for (int64_t s = 0; s < pieces; ++s) {
        const int64_t word = s * piece_words;
        starts[row * pieces + s] = at;
        at += kernels().columns(bits + word * 8, std::min(piece_words, words - word), static_cast<uint16_t>(64 * word),
                                columns + at);
      }
    }
    starts[some * pieces] = at;
    return {columns, w.values_data() + base * value_bytes, starts, pieces, std::min(at, w.nnz - base)};
  }
};

void from_tiles(const Product& p, const char* x, int64_t batch) {
  const Weight& w = p.weight;
  const bool decodes = w.format == Format::bitmap;
  const Decoded decoded(w, kDecodedSlab);
  const int64_t slab = decodes ? decoded.slab : w.slab, pieces = decodes ? decoded.pieces : w.pieces;
  const int64_t rows = tile_rows(w.k);
  Scratch scratch(w.op);
  const std::vector<Tile> tiles = tiles_of(batch, widest_tile(p.element, slab), rows, kernels().x_bytes[p.element], scratch);
  const int64_t row_bytes = tiles[0].width * p.accumulate_bytes;
  const int64_t block = decodes ? decoded.rows : std::clamp<int64_t>(kTotalBytes / row_bytes, 16, 64);
  const int64_t parts = parts_for((w.nnz + w.n) * batch);
  const int64_t totals_bytes = rounded_up(block * row_bytes, 64), part_bytes = totals_bytes + (decodes ? decoded.bytes : 0);
  const size_t own = scratch.reserve(parts * part_bytes);
  scratch.allocate();
  pack_tiles(kernels().pack_x[p.element], tiles, scratch, x, p.element_bytes, w.k);
  in_parts(parts, [&](int64_t part) {
    char* const totals = scratch.at(own + static_cast<size_t>(part * part_bytes));
    const int64_t end = w.bound(part + 1, parts);
    for (int64_t first = w.bound(part, parts); first < end; first += block) {
      const int64_t some = std::min(block, end - first);
      const Nonzeros nonzeros = decodes ? decoded.decode(w, first, some, p.element_bytes, totals + totals_bytes)
                                        : Nonzeros{w.columns_data(), w.values_data(), w.starts_data(), pieces, w.nnz};
      const char* bias = static_cast<const char*>(p.bias);
      if (decodes && bias != nullptr) bias += first * p.element_bytes;
      for (const Tile& tile : tiles) {
        const int64_t column_bytes = tile.width * kernels().x_bytes[p.element][tile.index];
        for (int64_t s = 0; s < pieces; ++s) {
          const char* x_tile = scratch.at(tile.memory) + s * slab / kBlock * kBlock * column_bytes;
          kernels().multiply[p.element][tile.index](nonzeros, decodes ? 0 : first, some, s, x_tile, column_mask(rows), s == 0,
                                                    bias, totals);
        }
        kernels().unpack[p.element](totals, tile.width, some, tile.batch, p.y_at(tile.first, first), w.n);
      }
    }
  });
}

Tensor sparse_linear(const Tensor& x_, const Tensor& values, const Tensor& bits, const Tensor& starts,
                     std::optional<Tensor> columns, std::optional<Tensor> bias_, std::string format) {
  const char* op = "_sparse_linear";
  require_floating(op, "x", x_);
  require(x_.dim() >= 1, op, ": x must be [.., K], got ", shape_of(x_));
  const int64_t k = x_.size(x_.dim() - 1), batch = batch_of(x_);
  const Weight w = describe(op, x_, values, bits, starts, columns, k, format);
  std::optional<Tensor> bias;
  if (bias_) {
    require(bias_->dim() == 1 && bias_->size(0) == w.n && bias_->scalar_type() == x_.scalar_type(), op, ": bias must be [", w.n,
            "] in the dtype of x, got ", shape_of(*bias_));
    bias = torch::stable::contiguous(*bias_);
  }
  Tensor y = result_of(x_, w.n);
  if (batch == 0 || w.n == 0) return y;
  if (k == 0) {
    if (bias) {
      torch::stable::copy_(y, *bias);
    } else {
      torch::stable::zero_(y);
    }
    return y;
  }
  const Tensor x = torch::stable::contiguous(x_);
  const Element element = element_of(x);
  const int64_t bytes = x.element_size();
  const Product p{w, element, element == kDouble ? 8 : 4, bytes, bias ? bias->const_data_ptr() : nullptr, y};
  const char* data = static_cast<const char*>(x.const_data_ptr());
  if (w.format == Format::bitmap && batch <= kBitmapRows) {
    from_bits(p, data, batch);
  } else {
    from_tiles(p, data, batch);
  }
  return y;
}

// ---- grad @ W ------------------------------------------------------------------------------------------------------------

// The nonzeros of a row whose columns lie in [first, last): columns, values and how many.
struct Run {
  const uint16_t* columns;
  const char* values;
  int64_t count;
};

Run run_of(const Weight& w, int64_t row, int64_t first, int64_t last, int64_t value_bytes, uint16_t* memory) {
  if (w.format == Format::bitmap) {
    const int64_t words = row_words(w.k), word = first / 64;
    const uint8_t* bits = w.bits_data() + row * words * 8;
    const int64_t from = std::min(w.row_start(row) + kernels().count(bits, word), w.nnz);
    const int64_t count = kernels().columns(bits + word * 8, row_words(last) - word, static_cast<uint16_t>(first), memory);
    return {memory, w.values_data() + from * value_bytes, std::min(count, w.nnz - from)};
  }
  const auto start = [&](int64_t piece) { return std::clamp<int64_t>(w.starts_data()[row * w.pieces + piece], 0, w.nnz); };
  int64_t from = start(first / w.slab), to = start((last - 1) / w.slab + 1);
  const uint16_t* columns = w.columns_data();
  if (to <= from) return {columns, w.values_data(), 0};
  if (first % w.slab != 0) from = std::lower_bound(columns + from, columns + to, static_cast<uint16_t>(first)) - columns;
  // Within a piece the low 16 bits of columns ascend, those of its last one being below those of `last` unless it ends there.
  if (last % w.slab != 0 && last < w.k)
    to = std::lower_bound(columns + from, columns + to, static_cast<uint16_t>(last)) - columns;
  return {columns + from, w.values_data() + from * value_bytes, to - from};
}

Tensor sparse_linear_transposed(const Tensor& grad_, const Tensor& values, const Tensor& bits, const Tensor& starts,
                                std::optional<Tensor> columns, int64_t k, std::string format) {
  const char* op = "_sparse_linear_transposed";
  require_floating(op, "grad", grad_);
  require(grad_.dim() >= 1, op, ": grad must be [.., N], got ", shape_of(grad_));
  require(k >= 0, op, ": k must be at least 0, got ", k);
  const Weight w = describe(op, grad_, values, bits, starts, columns, k, format);
  const int64_t n = grad_.size(grad_.dim() - 1), batch = batch_of(grad_);
  require(n == w.n, op, ": grad must be [.., ", w.n, "], got ", shape_of(grad_));
  Tensor x = result_of(grad_, k);
  if (batch == 0 || k == 0) return x;
  if (n == 0) {
    torch::stable::zero_(x);
    return x;
  }
  const Tensor grad = torch::stable::contiguous(grad_);
  const Element element = element_of(grad);
  const int64_t bytes = grad.element_size(), accumulate_bytes = element == kDouble ? 8 : 4;
  Scratch scratch(op);
  const int plain[kWidthCount] = {static_cast<int>(accumulate_bytes), static_cast<int>(accumulate_bytes),
                                  static_cast<int>(accumulate_bytes), static_cast<int>(accumulate_bytes),
                                  static_cast<int>(accumulate_bytes), static_cast<int>(accumulate_bytes)};
  const std::vector<Tile> tiles = tiles_of(batch, kWidths[kWidthCount - 1], n, plain, scratch);
  // Columns that are added to at a time: a power of two, so that slabs and blocks of 65536 are cut at their ends or evenly.
  int64_t parts = parts_for((w.nnz + n) * batch);
  const int64_t row_bytes = tiles[0].width * accumulate_bytes;
  int64_t range = kBlock;
  while (range > kNarrowestSlab && (range * row_bytes > kScatteredBytes || range * parts > rounded_up(k, range))) range /= 2;
  if (w.pieces > 1) range = std::max(range, w.slab);
  const int64_t ranges = (k - 1) / range + 1, range_rows = power_of_two(std::min(range, k));
  parts = std::min(parts, ranges);
  const int64_t tile_bytes = rounded_up(range_rows * row_bytes, 64), run_bytes = rounded_up((range + 64) * 2, 64);
  const int64_t all_bytes = tile_bytes * static_cast<int64_t>(tiles.size());
  const size_t own = scratch.reserve(parts * (all_bytes + run_bytes));
  scratch.allocate();
  pack_tiles(kernels().pack[element], tiles, scratch, grad.const_data_ptr(), bytes, n);
  in_parts(parts, [&](int64_t part) {
    char* const totals = scratch.at(own + static_cast<size_t>(part * (all_bytes + run_bytes)));
    uint16_t* const memory = reinterpret_cast<uint16_t*>(totals + all_bytes);
    for (int64_t r = ranges * part / parts; r < ranges * (part + 1) / parts; ++r) {
      const int64_t first = r * range, last = std::min(first + range, k);
      std::memset(totals, 0, static_cast<size_t>(all_bytes));
      for (int64_t row = 0; row < n; ++row) {
        const Run run = run_of(w, row, first, last, bytes, memory);
        for (size_t t = 0; t < tiles.size(); ++t) {
          const char* g = scratch.at(tiles[t].memory) + row * tiles[t].width * accumulate_bytes;
          kernels().scatter[element][tiles[t].index](run.columns, run.values, run.count, static_cast<uint32_t>(first),
                                                     static_cast<uint32_t>(range_rows - 1), g,
                                                     totals + static_cast<int64_t>(t) * tile_bytes);
        }
      }
      for (size_t t = 0; t < tiles.size(); ++t) {
        kernels().unpack[element](totals + static_cast<int64_t>(t) * tile_bytes, tiles[t].width, last - first, tiles[t].batch,
                                  static_cast<char*>(x.mutable_data_ptr()) + (tiles[t].first * k + first) * bytes, k);
      }
    }
  });
  return x;
}

// ---- inner products at the set bits --------------------------------------------------------------------------------------

// Where the values of each row begin, and their number. No bit may be set beyond k: kernels look up what stands there.
std::vector<int64_t> row_starts(const char* op, const Tensor& bits, int64_t n, int64_t k, int64_t nnz) {
  std::vector<int64_t> starts(static_cast<size_t>(n + 1));
  const uint8_t* data = static_cast<const uint8_t*>(bits.const_data_ptr());
  uint64_t beyond = 0;
  for (int64_t row = 0; row < n; ++row) {
    const uint8_t* own = data + row * row_bytes(k);
    starts[static_cast<size_t>(row + 1)] = starts[static_cast<size_t>(row)] + kernels().count(own, row_words(k));
    if (k % 64 == 0) continue;
    uint64_t last;
    std::memcpy(&last, own + row_bytes(k) - 8, sizeof(last));
    beyond |= last >> (k % 64);
  }
  require(beyond == 0, op, ": bits has bits set beyond its ", k, " columns, which must be zero; pack with pack_mask");
  require(starts.back() == nnz, op, ": nnz must be ", starts.back(), ", the number of set bits, got ", nnz);
  return starts;
}

// Rows that begin where about that share of all values does.
int64_t row_of_share(const std::vector<int64_t>& starts, int64_t part, int64_t parts) {
  const int64_t n = static_cast<int64_t>(starts.size()) - 1;
  if (part == parts) return n;
  return std::lower_bound(starts.begin(), starts.end() - 1, starts.back() / parts * part) - starts.begin();
}

Tensor sddmm(const Tensor& a_, const Tensor& b_, const Tensor& bits, int64_t nnz) {
  const char* op = "sddmm";
  require_floating(op, "a", a_);
  require(a_.scalar_type() == b_.scalar_type(), op, ": b must have the dtype of a");
  require(a_.dim() == 2 && b_.dim() == 2 && a_.size(1) == b_.size(1), op, ": a must be [N, D] and b [K, D], got ", shape_of(a_),
          " and ", shape_of(b_));
  const int64_t n = a_.size(0), k = b_.size(0), depth = a_.size(1);
  require_bits(op, "bits", bits, n, k);
  const std::vector<int64_t> starts = row_starts(op, bits, n, k, nnz);
  Tensor values = torch::stable::new_empty(a_, {nnz});
  if (nnz == 0) return values;
  const Tensor a = torch::stable::contiguous(a_), b = torch::stable::contiguous(b_);
  const Element element = element_of(a);
  const int64_t bytes = a.element_size(), line = std::max<int64_t>(depth * bytes, 1), words = row_words(k);
  // Columns at a time whose rows of b stay in the cache, for a block of rows of a that stays there too.
  const int64_t piece_words = std::clamp<int64_t>(kDotBytes / line / 64, 1, std::min(words, kBlock / 64));
  const int64_t block = std::clamp<int64_t>(kDotBytes / line, 1, 256);
  const int64_t parts = parts_for(nnz * (depth + 1));
  Scratch scratch(op);
  const int64_t part_bytes = rounded_up(64 * (piece_words + 1) * 2, 64) + block * 8;
  scratch.reserve(parts * rounded_up(part_bytes, 64));
  scratch.allocate();
  const char* from = static_cast<const char*>(a.const_data_ptr());
  const char* others = static_cast<const char*>(b.const_data_ptr());
  const uint8_t* all_bits = static_cast<const uint8_t*>(bits.const_data_ptr());
  char* to = static_cast<char*>(values.mutable_data_ptr());
  in_parts(parts, [&](int64_t part) {
    char* const memory = scratch.at(static_cast<size_t>(part * rounded_up(part_bytes, 64)));
    int64_t* const next = reinterpret_cast<int64_t*>(memory);
    uint16_t* const columns = reinterpret_cast<uint16_t*>(memory + block * 8);
    const int64_t end = row_of_share(starts, part + 1, parts);
    for (int64_t first = row_of_share(starts, part, parts); first < end; first += block) {
      const int64_t some = std::min(block, end - first);
      for (int64_t i = 0; i < some; ++i) next[i] = starts[static_cast<size_t>(first + i)];
      for (int64_t word = 0; word < words; word += piece_words) {
        for (int64_t i = 0; i < some; ++i) {
          const int64_t count =
              kernels().columns(all_bits + ((first + i) * words + word) * 8, std::min(piece_words, words - word), 0, columns);
          kernels().dots[element](from + (first + i) * line, others + 64 * word * line, depth, columns, count,
                                  to + next[i] * bytes);
          next[i] += count;
        }
      }
    }
  });
  return values;
}

// ---- masks as places -----------------------------------------------------------------------------------------------------

Tensor mask_starts(const Tensor& bits_, int64_t k, int64_t slab) {
  const char* op = "_mask_starts";
  require(k >= 0, op, ": k must be at least 0, got ", k);
  const int64_t pieces = pieces_of(op, k, slab);
  require(bits_.dim() == 2, op, ": bits must be [N, 8 * ceil(K / 64)], got ", shape_of(bits_));
  const Tensor bits = torch::stable::contiguous(bits_);
  const int64_t n = bits.size(0), words = row_words(k);
  require_bits(op, "bits", bits, n, k);
  Tensor starts = torch::stable::new_empty(bits, {n * pieces + 1}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(starts.mutable_data_ptr());
  const uint8_t* data = static_cast<const uint8_t*>(bits.const_data_ptr());
  const int64_t piece_words = pieces <= 1 ? words : slab / 64;
  int64_t total = 0;
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t s = 0; s < pieces; ++s) {
      *out++ = total;
      total += kernels().count(data + (row * words + s * piece_words) * 8, std::min(piece_words, words - s * piece_words));
    }
  }
  *out = total;
  return starts;
}

// bits of any rows of whole words, for ops that don't know k.
Tensor rows_of_words(const char* op, const Tensor& bits) {
  require(bits.scalar_type() == ScalarType::Byte, op, ": bits must be uint8");
  require(bits.dim() == 2 && bits.size(1) % 8 == 0, op, ": bits must be [N, 8 * ceil(K / 64)], got ", shape_of(bits));
  return torch::stable::contiguous(bits);
}

Tensor mask_columns(const Tensor& bits_, int64_t nnz) {
  const char* op = "_mask_columns";
  const Tensor bits = rows_of_words(op, bits_);
  const int64_t n = bits.size(0), words = bits.size(1) / 8;
  const std::vector<int64_t> starts = row_starts(op, bits, n, 64 * words, nnz);
  Tensor columns = torch::stable::new_empty(bits, {nnz}, ScalarType::Short);
  const int64_t parts = parts_for(nnz), piece_words = std::min<int64_t>(words, 64);
  Scratch scratch(op);
  const int64_t run_bytes = (piece_words + 1) * 64 * 2;
  scratch.reserve(parts * run_bytes);
  scratch.allocate();
  const uint8_t* data = static_cast<const uint8_t*>(bits.const_data_ptr());
  in_parts(parts, [&](int64_t part) {
    uint16_t* const run = reinterpret_cast<uint16_t*>(scratch.at(static_cast<size_t>(part * run_bytes)));
    const int64_t end = row_of_share(starts, part + 1, parts);
    for (int64_t row = row_of_share(starts, part, parts); row < end; ++row) {
      uint16_t* out = static_cast<uint16_t*>(columns.mutable_data_ptr()) + starts[static_cast<size_t>(row)];
      for (int64_t word = 0; word < words; word += piece_words) {
        const int64_t count = kernels().columns(data + (row * words + word) * 8, std::min(piece_words, words - word),
                                                static_cast<uint16_t>(64 * word), run);
        std::memcpy(out, run, static_cast<size_t>(2 * count));
        out += count;
      }
    }
  });
  return columns;
}

// Which of the kernels that only move values.
int mover(const Tensor& x) { return x.element_size() == 2 ? 0 : x.element_size() == 4 ? 1 : 2; }

Tensor gather_mask(const Tensor& weight_, const Tensor& bits, int64_t nnz) {
  const char* op = "_gather_mask";
  require_floating(op, "weight", weight_);
  const Rows rows = rows_of(op, "weight", weight_);
  require_bits(op, "bits", bits, rows.n, rows.k);
  const std::vector<int64_t> starts = row_starts(op, bits, rows.n, rows.k, nnz);
  Tensor values = torch::stable::new_empty(weight_, {nnz});
  const Tensor weight = torch::stable::contiguous(weight_);
  const int64_t bytes = weight.element_size(), parts = parts_for(rows.count());
  const uint8_t* data = static_cast<const uint8_t*>(bits.const_data_ptr());
  const char* from = static_cast<const char*>(weight.const_data_ptr());
  char* to = static_cast<char*>(values.mutable_data_ptr());
  in_parts(parts, [&](int64_t part) {
    const int64_t end = row_of_share(starts, part + 1, parts), last = starts[static_cast<size_t>(end)];
    for (int64_t row = row_of_share(starts, part, parts); row < end; ++row) {
      const int64_t at = starts[static_cast<size_t>(row)];
      kernels().gather[mover(weight)](data + row * row_bytes(rows.k), from + row * rows.k * bytes, rows.k, to + at * bytes,
                                      last - at);
    }
  });
  return values;
}

Tensor scatter_mask(const Tensor& values_, const Tensor& bits, int64_t k) {
  const char* op = "_scatter_mask";
  require_floating(op, "values", values_);
  require(values_.dim() == 1, op, ": values must be [nnz], got ", shape_of(values_));
  require(k >= 0, op, ": k must be at least 0, got ", k);
  require(bits.dim() == 2, op, ": bits must be [N, 8 * ceil(K / 64)], got ", shape_of(bits));
  const int64_t n = bits.size(0), nnz = values_.size(0);
  require_bits(op, "bits", bits, n, k);
  const std::vector<int64_t> starts = row_starts(op, bits, n, k, nnz);
  Tensor weight = torch::stable::new_empty(values_, {n, k});
  const Tensor values = torch::stable::contiguous(values_);
  const int64_t bytes = values.element_size(), parts = parts_for(n * k);
  const uint8_t* data = static_cast<const uint8_t*>(bits.const_data_ptr());
  const char* from = static_cast<const char*>(values.const_data_ptr());
  char* to = static_cast<char*>(weight.mutable_data_ptr());
  in_parts(parts, [&](int64_t part) {
    for (int64_t row = n * part / parts; row < n * (part + 1) / parts; ++row) {
      const int64_t at = starts[static_cast<size_t>(row)];
      kernels().scatter_row[mover(values)](data + row * row_bytes(k), from + at * bytes, nnz - at, to + row * k * bytes, k);
    }
  });
  return weight;
}

}  // namespace
}  // namespace sparse
}  // namespace fourfold

STABLE_TORCH_LIBRARY_IMPL(fourfold, CPU, m) {
  m.impl("_mask_starts", TORCH_BOX(&fourfold::sparse::mask_starts));
  m.impl("_mask_columns", TORCH_BOX(&fourfold::sparse::mask_columns));
  m.impl("_gather_mask", TORCH_BOX(&fourfold::sparse::gather_mask));
  m.impl("_scatter_mask", TORCH_BOX(&fourfold::sparse::scatter_mask));
  m.impl("_sparse_linear", TORCH_BOX(&fourfold::sparse::sparse_linear));
  m.impl("_sparse_linear_transposed", TORCH_BOX(&fourfold::sparse::sparse_linear_transposed));
  m.impl("sddmm", TORCH_BOX(&fourfold::sparse::sddmm));
}
