// The CoordConv ops on CPU: checks, geometry, threads. The arithmetic is in kernels.cpp, the meaning in reference/coordconv.py.
#include "coordconv/kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/isa.h"

namespace fourfold {

FOURFOLD_DECLARE_KERNELS(coordconv)

namespace coordconv {
namespace {

using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

const Kernels& kernels() {
  static const Kernels& best = FOURFOLD_BEST_KERNELS(coordconv);
  return best;
}

template <typename T>
const Pieces<T>& pieces() {
  if constexpr (sizeof(T) == sizeof(double)) {
    return kernels().doubles;
  } else {
    return kernels().floats;
  }
}

// Elements that a thread treats at a time: their part of the map stays in its first cache.
constexpr int64_t kChunk = 2048;
// Below this much work a second thread costs more than it brings.
constexpr int64_t kGrain = 32768;

// ---- layouts -------------------------------------------------------------------------------------------------------------

// How images [C, *size] of a batch lie: channel by channel, or, channels_last, position by position.
enum class Order { channels_first, channels_last };

// Whether dimensions first, first + 1, .. of x lie one inside the other in this order.
bool lies_in(const Tensor& x, const Ints& order) {
  int64_t expected = 1;
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    if (x.size(*d) == 1) continue;
    if (x.stride(*d) != expected) return false;
    expected *= x.size(*d);
  }
  return true;
}

// The order of x [.., C, *size] whose channel dimension is c; throws if it has neither.
Order order_of(const char* op, const char* name, const Tensor& x, int64_t c) {
  Ints first, last;
  for (int64_t d = 0; d < x.dim(); ++d) first.push_back(d);
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (d != c) last.push_back(d);
  }
  last.push_back(c);
  if (x.numel() == 0 || lies_in(x, first)) return Order::channels_first;
  require(lies_in(x, last), op, ": ", name, " must be contiguous or channels_last");
  return Order::channels_last;
}

bool lies_as(const Tensor& x, int64_t c, Order order) {
  Ints dims;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (d != c || order == Order::channels_first) dims.push_back(d);
  }
  if (order == Order::channels_last) dims.push_back(c);
  return x.numel() == 0 || lies_in(x, dims);
}

// ---- plans ---------------------------------------------------------------------------------------------------------------

constexpr int64_t kMaxRank = 3;

// One spatial axis of a plan.
template <typename T>
struct Axis {
  int64_t out = 0, k = 0, class_count = 0;
  const T* taps = nullptr;           // [k, out]
  const T* valid = nullptr;          // [class_count, k]
  const int32_t* classes = nullptr;  // [out]
  int64_t start = 0;                 // its first column in the tables
  int64_t combinations = 0;          // of the other axes' classes
};

// Equal classes that follow each other on the last axis.
struct Run {
  int64_t begin, end;
  int32_t of_class;
};

template <typename T>
struct Plan {
  std::vector<Axis<T>> axes;
  int64_t positions = 1, length = 0;  // outputs of a channel, columns of the tables

  int64_t rank() const { return static_cast<int64_t>(axes.size()); }
  Axis<T>& last() { return axes.back(); }
  const Axis<T>& last() const { return axes.back(); }

  // Where in axis a's columns its outputs begin, given the classes of all axes (its own is not used).
  int64_t column(int64_t a, const int32_t* of_class) const {
    int64_t combination = 0;
    for (int64_t b = 0; b < rank(); ++b) {
      if (b != a) combination = combination * axes[b].class_count + of_class[b];
    }
    return axes[a].start + combination * axes[a].out;
  }

  std::vector<Run> runs() const {
    std::vector<Run> result;
    for (int64_t o = 0; o < last().out; ++o) {
      const int32_t now = last().classes[o];
      if (result.empty() || result.back().of_class != now) result.push_back({o, o, now});
      result.back().end = o + 1;
    }
    return result;
  }
};

constexpr int64_t kMost = int64_t{1} << 40;

// A plan from out_size and class_count; sums of sizes that don't fit memory are refused.
template <typename T>
Plan<T> make_plan(const char* op, const Ints& out_size, const Ints& class_count) {
  Plan<T> plan;
  const int64_t rank = static_cast<int64_t>(out_size.size());
  require(1 <= rank && rank <= kMaxRank, op, ": there must be 1 to 3 spatial axes, got ", rank);
  require(static_cast<int64_t>(class_count.size()) == rank, op, ": class_count must have ", rank, " entries, got ",
          class_count.size());
  plan.axes.resize(rank);
  for (int64_t a = 0; a < rank; ++a) {
    require(out_size[a] >= 1 && class_count[a] >= 1 && class_count[a] <= out_size[a], op,
            ": every axis must have outputs and at most as many classes, got ", out_size[a], " and ", class_count[a]);
    require(out_size[a] <= kMost / plan.positions, op, ": the map is too large");
    plan.positions *= out_size[a];
    plan.axes[a].out = out_size[a];
    plan.axes[a].class_count = class_count[a];
  }
  for (int64_t a = 0; a < rank; ++a) {
    Axis<T>& axis = plan.axes[a];
    axis.combinations = 1;
    for (int64_t b = 0; b < rank; ++b) axis.combinations *= b == a ? 1 : class_count[b];
    axis.start = plan.length;
    plan.length += axis.combinations * axis.out;
  }
  return plan;
}

template <typename T>
void require_values(const char* op, const char* name, const Tensor& t, int64_t count) {
  const ScalarType type = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
  require(t.is_cpu() && t.scalar_type() == type && t.is_contiguous() && t.numel() == count, op, ": ", name, " must be ", count,
          " contiguous values in ", sizeof(T) == sizeof(double) ? "float64" : "float32", ", got shape ", shape_of(t));
}

template <typename T>
void set_taps(Plan<T>& plan, const char* op, const Tensor& taps, const Tensor& valid, const Ints& kernel) {
  require(static_cast<int64_t>(kernel.size()) == plan.rank(), op, ": kernel must have ", plan.rank(), " sizes, got ",
          kernel.size());
  int64_t tap_count = 0, valid_count = 0;
  for (int64_t a = 0; a < plan.rank(); ++a) {
    require(kernel[a] >= 1, op, ": kernel sizes must be at least 1, got ", kernel[a]);
    require(kernel[a] <= kMost / plan.axes[a].out, op, ": the taps are too many");
    plan.axes[a].k = kernel[a];
    tap_count += kernel[a] * plan.axes[a].out;
    valid_count += kernel[a] * plan.axes[a].class_count;
  }
  require_values<T>(op, "taps", taps, tap_count);
  require_values<T>(op, "valid", valid, valid_count);
  const T* tap = static_cast<const T*>(taps.const_data_ptr());
  const T* inside = static_cast<const T*>(valid.const_data_ptr());
  for (Axis<T>& axis : plan.axes) {
    axis.taps = tap;
    axis.valid = inside;
    tap += axis.k * axis.out;
    inside += axis.k * axis.class_count;
  }
}

template <typename T>
void set_classes(Plan<T>& plan, const char* op, const Tensor& classes) {
  int64_t count = 0;
  for (const Axis<T>& axis : plan.axes) count += axis.out;
  require(classes.is_cpu() && classes.scalar_type() == ScalarType::Int && classes.is_contiguous() && classes.numel() == count,
          op, ": classes must be ", count, " contiguous values in int32, got shape ", shape_of(classes));
  const int32_t* of_class = static_cast<const int32_t*>(classes.const_data_ptr());
  for (Axis<T>& axis : plan.axes) {
    axis.classes = of_class;
    for (int64_t o = 0; o < axis.out; ++o) {
      require(0 <= of_class[o] && of_class[o] < axis.class_count, op, ": classes must lie in 0..", axis.class_count - 1,
              ", got ", of_class[o]);
    }
    of_class += axis.out;
  }
}

// Walks the outputs of all axes but the last.
struct Outer {
  int64_t o[kMaxRank] = {};
  int32_t of_class[kMaxRank] = {};

  template <typename T>
  Outer(const Plan<T>& plan, int64_t row) {
    for (int64_t a = plan.rank() - 2; a >= 0; --a) {
      o[a] = row % plan.axes[a].out;
      of_class[a] = plan.axes[a].classes[o[a]];
      row /= plan.axes[a].out;
    }
  }
};

// ---- weights -------------------------------------------------------------------------------------------------------------

// The kernel's taps in row-major order: k[a] is the tap along axis a.
template <typename T, typename Visit>
void for_each_tap(const Plan<T>& plan, Visit visit) {
  int64_t count = 1;
  for (const Axis<T>& axis : plan.axes) count *= axis.k;
  for (int64_t flat = 0; flat < count; ++flat) {
    int64_t k[kMaxRank] = {}, rest = flat;
    for (int64_t a = plan.rank() - 1; a >= 0; --a) {
      k[a] = rest % plan.axes[a].k;
      rest /= plan.axes[a].k;
    }
    visit(k);
  }
}

// Calls visit(combination) for each combination of the other axes' classes in which tap k falls inside on all of them.
template <typename T, typename Visit>
void for_each_combination(const Plan<T>& plan, int64_t a, const int64_t* k, Visit visit) {
  for (int64_t combination = 0; combination < plan.axes[a].combinations; ++combination) {
    int64_t rest = combination;
    bool inside = true;
    for (int64_t b = plan.rank() - 1; b >= 0; --b) {
      if (b == a) continue;
      const Axis<T>& axis = plan.axes[b];
      inside &= axis.valid[rest % axis.class_count * axis.k + k[b]] != T{0};
      rest /= axis.class_count;
    }
    if (inside) visit(combination);
  }
}

void require_channels(const char* op, const Ints& channels, int64_t rank, int64_t coord_channels) {
  require(static_cast<int64_t>(channels.size()) == rank, op, ": channels must have ", rank, " entries, got ", channels.size());
  for (int64_t channel : channels) {
    require(0 <= channel && channel < coord_channels, op, ": channels must lie in 0..", coord_channels - 1, ", got ", channel);
  }
}

// Where weight [Cout, nc, *k] has tap k of a coordinate channel.
int64_t offset_of(const Tensor& weight, int64_t rank, int64_t channel, const int64_t* k) {
  int64_t offset = channel * weight.stride(1);
  for (int64_t a = 0; a < rank; ++a) offset += k[a] * weight.stride(2 + a);
  return offset;
}

// Splits channels among threads in blocks that are whole vectors; what is computed for one does not depend on the split.
template <typename Visit>
void over_channels(int64_t channels, int64_t work_per_channel, const Visit& visit) {
  constexpr int64_t kBlock = 16;
  const int64_t blocks = (channels + kBlock - 1) / kBlock;
  const int64_t grain = kGrain / (work_per_channel * kBlock + 1) + 1;
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    visit(begin * kBlock, std::min(end * kBlock, channels) - begin * kBlock);
  });
}

// ---- tables --------------------------------------------------------------------------------------------------------------

// Element (row, channel) of the tables [Cout, L] is at row * row_step + channel * channel_step.
template <typename T>
void fill_tables(const Plan<T>& plan, const Tensor& weight, const Ints& channels, T* tables, bool channels_last) {
  const Pieces<T>& p = pieces<T>();
  const int64_t cout = weight.size(0), step = weight.stride(0);
  const T* w = static_cast<const T*>(weight.const_data_ptr());
  int64_t taps = 0;
  for (const Axis<T>& axis : plan.axes) taps = std::max(taps, axis.k);
  over_channels(cout, plan.length * taps, [&](int64_t first, int64_t count) {
    std::vector<T> summed;  // [combination, k, count]: weights summed over the other axes' valid taps
    for (int64_t a = 0; a < plan.rank(); ++a) {
      const Axis<T>& axis = plan.axes[a];
      summed.assign(axis.combinations * axis.k * count, T{0});
      for_each_tap(plan, [&](const int64_t* k) {
        const T* from = w + first * step + offset_of(weight, plan.rank(), channels[a], k);
        for_each_combination(plan, a, k, [&](int64_t combination) {
          T* to = summed.data() + (combination * axis.k + k[a]) * count;
          for (int64_t c = 0; c < count; ++c) to[c] += from[c * step];
        });
      });
      for (int64_t combination = 0; combination < axis.combinations; ++combination) {
        const T* of_taps = summed.data() + combination * axis.k * count;
        const int64_t row = axis.start + combination * axis.out;
        if (channels_last) {
          for (int64_t o = 0; o < axis.out; ++o) {
            T* to = tables + (row + o) * cout + first;
            std::fill(to, to + count, T{0});
            for (int64_t k = 0; k < axis.k; ++k) p.add_multiple(to, of_taps + k * count, axis.taps[k * axis.out + o], count);
          }
        } else {
          for (int64_t c = 0; c < count; ++c) {
            T* to = tables + (first + c) * plan.length + row;
            std::fill(to, to + axis.out, T{0});
            for (int64_t k = 0; k < axis.k; ++k) p.add_multiple(to, axis.taps + k * axis.out, of_taps[k * count + c], axis.out);
          }
        }
      }
    }
  });
}

bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

template <typename T>
Tensor tables_of(const Tensor& weight, const Tensor& taps, const Tensor& valid, const Ints& out_size, const Ints& class_count,
                 const Ints& channels, bool channels_last) {
  const char* op = "_coord_tables";
  Plan<T> plan = make_plan<T>(op, out_size, class_count);
  require(weight.dim() == plan.rank() + 2, op, ": coord_weight must be [Cout, nc, *k] with ", plan.rank(), " kernel axes, got ",
          shape_of(weight));
  Ints kernel;
  for (int64_t a = 0; a < plan.rank(); ++a) kernel.push_back(weight.size(2 + a));
  set_taps(plan, op, taps, valid, kernel);
  require(weight.is_cpu() && weight.scalar_type() == taps.scalar_type(), op, ": coord_weight must be of the type of taps");
  require_channels(op, channels, plan.rank(), weight.size(1));
  const int64_t cout = weight.size(0);
  Ints sizes{cout, plan.length};
  if (channels_last) std::swap(sizes[0], sizes[1]);
  Tensor tables = torch::stable::new_empty(taps, sizes);
  if (cout > 0) fill_tables<T>(plan, weight, channels, static_cast<T*>(tables.mutable_data_ptr()), channels_last);
  return channels_last ? torch::stable::transpose(tables, 0, 1) : tables;
}

Tensor coord_tables(const Tensor& coord_weight, const Tensor& taps, const Tensor& valid, Ints out_size, Ints class_count,
                    Ints channels, bool channels_last) {
  return is_double(taps) ? tables_of<double>(coord_weight, taps, valid, out_size, class_count, channels, channels_last)
                         : tables_of<float>(coord_weight, taps, valid, out_size, class_count, channels, channels_last);
}

// ---- adding the map ------------------------------------------------------------------------------------------------------

// The tables [Cout, L] of a plan, and how to add the map that they stand for to images [C, *out].
template <typename T>
struct Map {
  const Plan<T>& plan;
  std::vector<Run> runs;
  const T* tables;  // in the memory order of the images
  int64_t channels;
  const Pieces<T>& p = pieces<T>();

  int64_t rows() const { return plan.positions / plan.last().out; }

  // Adds row `row` of the map to the same row of an image in channels_last: y and activated are [last axis, C].
  void add_row_last(AddMap add_map, char* y, char* activated, int64_t bytes, int64_t row, std::vector<T>& summed) const {
    const int64_t rank = plan.rank(), width = plan.last().out;
    Outer outer(plan, row);
    const T* along = tables + plan.column(rank - 1, outer.of_class) * channels;
    if (rank == 1) return add_map(y, along, nullptr, activated, width, channels);
    for (const Run& run : runs) {
      outer.of_class[rank - 1] = run.of_class;
      const T* across = tables + (plan.column(0, outer.of_class) + outer.o[0]) * channels;
      if (rank == 3) {
        summed.assign(across, across + channels);
        p.add(summed.data(), tables + (plan.column(1, outer.of_class) + outer.o[1]) * channels, channels);
        across = summed.data();
      }
      const int64_t first = run.begin * channels;
      add_map(y + first * bytes, along + first, across, activated == nullptr ? nullptr : activated + first * bytes,
              run.end - run.begin, channels);
    }
  }

  // Elements [begin, end) of the map [C, *out] itself.
  void build_first(T* map, int64_t begin, int64_t end) const {
    const int64_t width = plan.last().out, rank = plan.rank();
    const int64_t first = begin;
    while (begin < end) {
      const int64_t c = begin / width / rows(), w = begin % width, stop = std::min(width, w + end - begin);
      Outer outer(plan, begin / width % rows());
      const T* table = tables + c * plan.length;
      const T* along = table + plan.column(rank - 1, outer.of_class);
      T* to = map + (begin - first);
      for (const Run& run : runs) {
        const int64_t from = std::max(run.begin, w), until = std::min(run.end, stop);
        if (from >= until) continue;
        outer.of_class[rank - 1] = run.of_class;
        T across{0};
        for (int64_t a = 0; a + 1 < rank; ++a) across += table[plan.column(a, outer.of_class) + outer.o[a]];
        if (until - from == 1) {
          to[from - w] = along[from] + across;  // the phases of a transposed convolution
        } else {
          p.add_number(to + (from - w), along + from, across, until - from);
        }
      }
      begin += stop - w;
    }
  }

  // y [B, C, *out] in channels_last: memory is walked once from end to end, the tables stay in cache.
  void add_last(AddMap add_map, char* y, char* activated, int64_t bytes, int64_t batch) const {
    const int64_t size = plan.last().out * channels;
    torch::stable::parallel_for(0, batch * rows(), kGrain / size + 1, [&](int64_t begin, int64_t end) {
      std::vector<T> summed;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t offset = i * size * bytes;
        add_row_last(add_map, y + offset, activated == nullptr ? nullptr : activated + offset, bytes, i % rows(), summed);
      }
    });
  }

  // y [B, C, *out] otherwise: rows are short, so the map is built in pieces, each for all samples while it is in cache.
  void add_first(AddMap add_map, char* y, char* activated, int64_t bytes, int64_t batch) const {
    const int64_t image = plan.positions * channels, chunks = (image + kChunk - 1) / kChunk;
    torch::stable::parallel_for(0, chunks * batch, kGrain / kChunk, [&](int64_t begin, int64_t end) {
      T map[kChunk];
      int64_t built = -1;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t chunk = i / batch, first = chunk * kChunk, stop = std::min(image, first + kChunk);
        if (chunk != built) build_first(map, first, stop);
        built = chunk;
        const int64_t offset = (i % batch * image + first) * bytes;
        add_map(y + offset, map, nullptr, activated == nullptr ? nullptr : activated + offset, 1, stop - first);
      }
    });
  }

  void add(bool last, AddMap add_map, char* y, char* activated, int64_t bytes, int64_t batch) const {
    last ? add_last(add_map, y, activated, bytes, batch) : add_first(add_map, y, activated, bytes, batch);
  }
};

// Adds one image to each of a batch.
template <typename T>
void add_image(AddMap add_map, char* y, char* activated, int64_t bytes, int64_t batch, const T* image, int64_t size) {
  const int64_t chunks = (size + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, batch * chunks, kGrain / kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % chunks * kChunk, count = std::min(kChunk, size - first);
      const int64_t offset = (i / chunks * size + first) * bytes;
      add_map(y + offset, image + first, nullptr, activated == nullptr ? nullptr : activated + offset, 1, count);
    }
  });
}

Activation parse_activation(const char* op, const std::string& activation) {
  if (activation == "none") return kNone;
  if (activation == "relu") return kRelu;
  if (activation == "silu") return kSilu;
  require(activation == "gelu", op, ": activation must be 'none', 'relu', 'silu' or 'gelu', got '", activation, "'");
  return kGelu;
}

bool same_sizes(const Tensor& a, const Tensor& b, int64_t skipped) {
  if (a.dim() != b.dim() + skipped) return false;
  for (int64_t d = 0; d < b.dim(); ++d) {
    if (a.size(d + skipped) != b.size(d)) return false;
  }
  return true;
}

template <typename T>
void run_add_map(const Tensor& y, const Tensor& tables, const Tensor& classes, const Ints& class_count,
                 const std::optional<Tensor>& dense, Activation activation, const std::optional<Tensor>& activated) {
  const char* op = "_add_map_";
  const int64_t batch = y.size(0), channels = y.size(1);
  Ints out_size;
  for (int64_t d = 2; d < y.dim(); ++d) out_size.push_back(y.size(d));
  const Order order = order_of(op, "y", y, 1);
  if (y.numel() == 0) return;
  Plan<T> plan = make_plan<T>(op, out_size, class_count);
  set_classes(plan, op, classes);
  const ScalarType type = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
  require(tables.is_cpu() && tables.scalar_type() == type && tables.dim() == 2 && tables.size(0) == channels &&
              tables.size(1) == plan.length,
          op, ": tables must be [", channels, ", ", plan.length, "] in the map's type, got ", shape_of(tables));
  // Tables in the other order are few enough to copy.
  const bool last = order == Order::channels_last;
  const Tensor in_order = torch::stable::contiguous(last ? torch::stable::transpose(tables, 0, 1) : tables);
  if (dense) {
    require(dense->is_cpu() && dense->scalar_type() == type && same_sizes(y, *dense, 1) && lies_as(*dense, 0, order), op,
            ": dense must be an image of y's shape and memory order in the map's type, got ", shape_of(*dense));
  }
  if (activated) {
    require(activated->is_cpu() && activated->scalar_type() == y.scalar_type() && same_sizes(y, *activated, 0) &&
                lies_as(*activated, 1, order),
            op, ": activated must be of y's shape, type and memory order, got ", shape_of(*activated));
  }
  const Map<T> map{plan, plan.runs(), static_cast<const T*>(in_order.const_data_ptr()), channels};
  const auto& add_map = kernels().add_map;
  char* to = static_cast<char*>(y.mutable_data_ptr());
  char* also = activated ? static_cast<char*>(activated->mutable_data_ptr()) : nullptr;
  if (!dense) return map.add(last, add_map[element_of(y)][activation], to, also, y.element_size(), batch);
  const Tensor total = torch::stable::clone(*dense);
  map.add(last, add_map[element_of(total)][kNone], static_cast<char*>(total.mutable_data_ptr()), nullptr, sizeof(T), 1);
  add_image(add_map[element_of(y)][activation], to, also, y.element_size(), batch,
            static_cast<const T*>(total.const_data_ptr()), plan.positions * channels);
}

void add_map(Tensor y, const Tensor& tables, const Tensor& classes, Ints class_count, std::optional<Tensor> dense,
             std::string activation, std::optional<Tensor> activated) {
  const char* op = "_add_map_";
  require_floating(op, "y", y);
  require(y.dim() >= 3 && y.dim() <= 5, op, ": y must be [B, C, *out] with 1 to 3 spatial axes, got ", shape_of(y));
  const Activation a = parse_activation(op, activation);
  is_double(y) ? run_add_map<double>(y, tables, classes, class_count, dense, a, activated)
               : run_add_map<float>(y, tables, classes, class_count, dense, a, activated);
}

// ---- gradients -----------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> batch_sum(const Tensor& grad, std::optional<Tensor> relu_output) {
  const char* op = "_batch_sum";
  require_floating(op, "grad", grad);
  require(grad.dim() >= 3 && grad.dim() <= 5, op, ": grad must be [B, C, *size] with 1 to 3 spatial axes, got ",
          shape_of(grad));
  const Order order = order_of(op, "grad", grad, 1);
  if (relu_output) {
    require(relu_output->is_cpu() && relu_output->scalar_type() == grad.scalar_type() && same_sizes(grad, *relu_output, 0) &&
                lies_as(*relu_output, 1, order),
            op, ": relu_output must be of grad's shape, type and memory order, got ", shape_of(*relu_output));
  }
  const bool last = order == Order::channels_last;
  Ints sizes;
  if (!last) sizes.push_back(grad.size(1));
  for (int64_t d = 2; d < grad.dim(); ++d) sizes.push_back(grad.size(d));
  if (last) sizes.push_back(grad.size(1));
  Tensor total = torch::stable::new_empty(grad, sizes, accumulate_type(grad));
  Tensor kept = relu_output ? torch::stable::empty_like(grad) : torch::stable::new_empty(grad, {0});
  const int64_t batch = grad.size(0), image = total.numel(), bytes = grad.element_size();
  if (image > 0) {
    const AddGrads add_grads = kernels().add_grads[element_of(grad)];
    // Long walks through memory count more than a sum that stays in the first of the caches.
    const int64_t chunk = std::max<int64_t>(256, std::min<int64_t>(8 * kChunk, image / 8));
    const int64_t chunks = (image + chunk - 1) / chunk, total_bytes = total.element_size();
    const char* from = static_cast<const char*>(grad.const_data_ptr());
    const char* mask = relu_output ? static_cast<const char*>(relu_output->const_data_ptr()) : nullptr;
    char* to = static_cast<char*>(total.mutable_data_ptr());
    char* keep = relu_output ? static_cast<char*>(kept.mutable_data_ptr()) : nullptr;
    torch::stable::parallel_for(0, chunks, kGrain / (chunk * batch + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * chunk, count = std::min(chunk, image - first), offset = first * bytes;
        std::fill_n(to + first * total_bytes, count * total_bytes, char{0});
        add_grads(from + offset, relu_output ? mask + offset : nullptr, relu_output ? keep + offset : nullptr,
                  to + first * total_bytes, count, batch, image);
      }
    });
  }
  // [*size, C] seen as [C, *size]: the channels change places with each axis in turn.
  for (int64_t d = total.dim() - 1; last && d > 0; --d) total = torch::stable::transpose(total, d - 1, d);
  return {total, kept};
}

// The gradient of channels [first, first + count) of the tables from that of the map: [length, count] or [count, length].
template <typename T>
void tables_gradient(const Plan<T>& plan, const std::vector<Run>& runs, const T* grad, int64_t channels, bool channels_last,
                     int64_t first, int64_t count, T* tables) {
  const Pieces<T>& p = pieces<T>();
  const int64_t width = plan.last().out, rows = plan.positions / width, rank = plan.rank();
  for (int64_t row = 0; row < rows; ++row) {
    Outer outer(plan, row);
    if (channels_last) {
      const T* from = grad + row * width * channels + first;
      T* along = tables + plan.column(rank - 1, outer.of_class) * count;
      p.add_rows(along, count, from, channels, width, count);
      for (const Run& run : runs) {
        outer.of_class[rank - 1] = run.of_class;
        for (int64_t a = 0; a + 1 < rank; ++a) {
          T* across = tables + (plan.column(a, outer.of_class) + outer.o[a]) * count;
          p.sum_rows(across, from + run.begin * channels, channels, run.end - run.begin, count);
        }
      }
      continue;
    }
    for (int64_t c = 0; c < count; ++c) {
      const T* from = grad + ((first + c) * rows + row) * width;
      T* table = tables + c * plan.length;
      p.add(table + plan.column(rank - 1, outer.of_class), from, width);
      for (const Run& run : runs) {
        outer.of_class[rank - 1] = run.of_class;
        const T total = p.sum(from + run.begin, run.end - run.begin);
        for (int64_t a = 0; a + 1 < rank; ++a) table[plan.column(a, outer.of_class) + outer.o[a]] += total;
      }
    }
  }
}

template <typename T>
std::tuple<Tensor, Tensor> tables_backward(const Tensor& map_grad, const Tensor& taps, const Tensor& valid,
                                           const Tensor& classes, const Ints& kernel, const Ints& class_count,
                                           const Ints& channels, int64_t coord_channels) {
  const char* op = "_coord_tables_backward";
  Ints out_size;
  for (int64_t d = 1; d < map_grad.dim(); ++d) out_size.push_back(map_grad.size(d));
  Plan<T> plan = make_plan<T>(op, out_size, class_count);
  set_taps(plan, op, taps, valid, kernel);
  set_classes(plan, op, classes);
  require(coord_channels >= 1 && coord_channels <= kMaxRank + 1, op, ": coord_channels must be 1 to 4, got ", coord_channels);
  require_channels(op, channels, plan.rank(), coord_channels);
  const bool last = order_of(op, "map_grad", map_grad, 0) == Order::channels_last;
  const int64_t cout = map_grad.size(0), rank = plan.rank();
  Ints sizes{cout, coord_channels};
  sizes.insert(sizes.end(), kernel.begin(), kernel.end());
  Tensor weight = torch::stable::new_zeros(taps, sizes), bias = torch::stable::new_zeros(taps, {cout});
  if (cout == 0) return {weight, bias};
  const Pieces<T>& p = pieces<T>();
  const std::vector<Run> runs = plan.runs();
  const T* grad = static_cast<const T*>(map_grad.const_data_ptr());
  T* w = static_cast<T*>(weight.mutable_data_ptr());
  T* b = static_cast<T*>(bias.mutable_data_ptr());
  const int64_t step = weight.stride(0);
  over_channels(cout, plan.positions, [&](int64_t first, int64_t count) {
    std::vector<T> tables(plan.length * count, T{0}), summed;
    tables_gradient(plan, runs, grad, cout, last, first, count, tables.data());
    // Every position is in the last axis's part of the tables once.
    const Axis<T>& whole = plan.last();
    const int64_t entries = whole.combinations * whole.out;
    if (last) {
      p.sum_rows(b + first, tables.data() + whole.start * count, count, entries, count);
    } else {
      for (int64_t c = 0; c < count; ++c) b[first + c] = p.sum(tables.data() + c * plan.length + whole.start, entries);
    }
    for (int64_t a = 0; a < rank; ++a) {
      const Axis<T>& axis = plan.axes[a];
      summed.assign(axis.combinations * axis.k * count, T{0});  // [combination, k, count]
      for (int64_t combination = 0; combination < axis.combinations; ++combination) {
        const int64_t row = axis.start + combination * axis.out;
        for (int64_t k = 0; k < axis.k; ++k) {
          T* to = summed.data() + (combination * axis.k + k) * count;
          const T* tap = axis.taps + k * axis.out;
          if (last) {
            for (int64_t o = 0; o < axis.out; ++o) p.add_multiple(to, tables.data() + (row + o) * count, tap[o], count);
          } else {
            for (int64_t c = 0; c < count; ++c) to[c] = p.dot(tables.data() + c * plan.length + row, tap, axis.out);
          }
        }
      }
      for_each_tap(plan, [&](const int64_t* k) {
        T* to = w + first * step + offset_of(weight, rank, channels[a], k);
        for_each_combination(plan, a, k, [&](int64_t combination) {
          const T* from = summed.data() + (combination * axis.k + k[a]) * count;
          for (int64_t c = 0; c < count; ++c) to[c * step] += from[c];
        });
      });
    }
  });
  return {weight, bias};
}

std::tuple<Tensor, Tensor> coord_tables_backward(const Tensor& map_grad, const Tensor& taps, const Tensor& valid,
                                                 const Tensor& classes, Ints kernel, Ints class_count, Ints channels,
                                                 int64_t coord_channels) {
  const char* op = "_coord_tables_backward";
  require(map_grad.dim() >= 2 && map_grad.dim() <= 4, op, ": map_grad must be [C, *out] with 1 to 3 spatial axes, got ",
          shape_of(map_grad));
  require(map_grad.scalar_type() == taps.scalar_type(), op, ": map_grad must be of the type of taps");
  return is_double(map_grad)
             ? tables_backward<double>(map_grad, taps, valid, classes, kernel, class_count, channels, coord_channels)
             : tables_backward<float>(map_grad, taps, valid, classes, kernel, class_count, channels, coord_channels);
}

}  // namespace
}  // namespace coordconv
}  // namespace fourfold

STABLE_TORCH_LIBRARY_IMPL(fourfold, CPU, m) {
  using namespace fourfold::coordconv;
  m.impl("_coord_tables", TORCH_BOX(&coord_tables));
  m.impl("_coord_tables_backward", TORCH_BOX(&coord_tables_backward));
  m.impl("_add_map_", TORCH_BOX(&add_map));
  m.impl("_batch_sum", TORCH_BOX(&batch_sum));
}
