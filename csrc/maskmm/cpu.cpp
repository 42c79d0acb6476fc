// Packed masks, masks of scores and masked products on CPU: checks, allocation, threads. The arithmetic is in kernels.cpp and
// sampler_kernels.cpp, the meaning in reference/maskmm.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/aten.h"
#include "common/checks.h"
#include "common/isa.h"
#include "maskmm/bits.h"
#include "maskmm/kernels.h"

namespace fourfold {

FOURFOLD_DECLARE_KERNELS(maskmm)
FOURFOLD_DECLARE_KERNELS(sampling)

namespace maskmm {
namespace {

using Optional = std::optional<Tensor>;

const Kernels& kernels() {
  static const Kernels& best = FOURFOLD_BEST_KERNELS(maskmm);
  return best;
}

const sampling::Kernels& samplers() {
  static const sampling::Kernels& best = FOURFOLD_BEST_KERNELS(sampling);
  return best;
}

// Below this many elements a second thread costs more than it brings.
constexpr int64_t kGrain = 32768;

// work(begin, end) over parts of n rows of k elements.
template <typename Work>
void for_rows(int64_t n, int64_t k, const Work& work) {
  if (n == 0) return;
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, kGrain / std::max<int64_t>(k, 1)), work);
}

const char* bytes_of(const Tensor& x) { return static_cast<const char*>(x.const_data_ptr()); }
char* mutable_bytes_of(const Tensor& x) { return static_cast<char*>(x.mutable_data_ptr()); }

Tensor new_bits(const Tensor& like, const Rows& rows) {
  return torch::stable::new_empty(like, {rows.n, row_bytes(rows.k)}, ScalarType::Byte);
}

Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// ---- bits ----------------------------------------------------------------------------------------------------------------

Tensor pack_mask(const Tensor& mask) {
  const char* op = "pack_mask";
  require(mask.scalar_type() == ScalarType::Bool, op, ": mask must be bool");
  const Rows rows = rows_of(op, "mask", mask);
  const Tensor from = dense(mask), bits = new_bits(mask, rows);
  const uint8_t* in = reinterpret_cast<const uint8_t*>(bytes_of(from));
  uint8_t* out = static_cast<uint8_t*>(bits.mutable_data_ptr());
  for_rows(rows.n, rows.k, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) kernels().pack(in + n * rows.k, out + n * row_bytes(rows.k), rows.k);
  });
  return bits;
}

Tensor unpack_mask(const Tensor& bits, int64_t k) {
  const char* op = "unpack_mask";
  require(k >= 0, op, ": k must be at least 0, got ", k);
  require(bits.dim() == 2, op, ": bits must be [N, ", row_bytes(k), "], got ", shape_of(bits));
  const int64_t n_rows = bits.size(0);
  require_bits(op, "bits", bits, n_rows, k);
  const Tensor mask = torch::stable::new_empty(bits, {n_rows, k}, ScalarType::Bool);
  const uint8_t* in = static_cast<const uint8_t*>(bits.const_data_ptr());
  uint8_t* out = reinterpret_cast<uint8_t*>(mutable_bytes_of(mask));
  for_rows(n_rows, k, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) kernels().unpack(in + n * row_bytes(k), out + n * k, k);
  });
  return mask;
}

// ---- masks of scores -----------------------------------------------------------------------------------------------------

struct Scores {
  Tensor values;  // contiguous
  Rows rows;
  Element element;
  const char* row(int64_t n) const { return bytes_of(values) + n * rows.k * values.element_size(); }
};

Scores scores_of(const char* op, const Tensor& scores) {
  require_floating(op, "scores", scores);
  const Rows rows = rows_of(op, "scores", scores);
  return {dense(scores), rows, element_of(scores)};
}

// Says how many scores are NaN and where the first is.
[[noreturn]] void refuse_nan(const char* op, const Scores& scores) {
  std::vector<uint8_t> finite(row_bytes(scores.rows.k)), negative(row_bytes(scores.rows.k));
  int64_t count = 0, first = -1;
  for (int64_t n = 0; n < scores.rows.n; ++n) {
    // A NaN is neither at least zero nor below it.
    if (!kernels().at_least[scores.element](scores.row(n), 0.0, finite.data(), scores.rows.k)) continue;
    kernels().below[scores.element](scores.row(n), 0.0, negative.data(), scores.rows.k);
    for (int64_t i = 0; i < scores.rows.k; ++i) {
      if (((finite[i / 8] | negative[i / 8]) >> (i % 8)) & 1) continue;
      ++count;
      if (first < 0) first = n * scores.rows.k + i;
    }
  }
  require(false, op, ": scores hold ", count, " NaN, the first at flat index ", first, "; mend them before a mask is made");
  std::abort();
}

// of_row(n, bits) makes a row and says whether it met a NaN.
template <typename OfRow>
Tensor mask_of(const char* op, const Scores& scores, const OfRow& of_row) {
  const Tensor bits = new_bits(scores.values, scores.rows);
  uint8_t* out = static_cast<uint8_t*>(bits.mutable_data_ptr());
  std::atomic<bool> nan{false};
  for_rows(scores.rows.n, scores.rows.k, [&](int64_t begin, int64_t end) {
    bool met = false;
    for (int64_t n = begin; n < end; ++n) met |= of_row(n, out + n * row_bytes(scores.rows.k));
    if (met) nan = true;
  });
  if (nan) refuse_nan(op, scores);
  return bits;
}

Tensor bernoulli_mask(const Tensor& scores, const Tensor& seed, int64_t offset) {
  const char* op = "bernoulli_mask";
  const Scores s = scores_of(op, scores);
  require(seed.is_cpu() && seed.scalar_type() == ScalarType::Long && seed.numel() == 1, op,
          ": seed must be an int64 tensor with one element on the scores' device, got shape ", shape_of(seed));
  const uint64_t key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  const auto draw = samplers().bernoulli[s.element];
  return mask_of(op, s, [&](int64_t n, uint8_t* bits) {
    return draw(s.row(n), static_cast<uint64_t>(n * s.rows.k), s.rows.k, key, static_cast<uint64_t>(offset), bits);
  });
}

Tensor threshold_mask(const Tensor& scores, double threshold) {
  const char* op = "threshold_mask";
  require(threshold == threshold, op, ": threshold must not be NaN");
  const Scores s = scores_of(op, scores);
  const auto compare = kernels().at_least[s.element];
  return mask_of(op, s, [&](int64_t n, uint8_t* bits) { return compare(s.row(n), threshold, bits, s.rows.k); });
}

// Which of n scores are kept: all above `key`, and the first `ties` of the `equal` ones that have it.
struct Cut {
  uint64_t key = 0;
  int64_t ties = 0, equal = 0;
};

// Digit by digit from the highest, each by a histogram of the keys that begin with the digits found.
Cut find_cut(const char* op, const Scores& s, bool abs, int64_t keep) {
  constexpr int64_t kDigits = int64_t{1} << kDigitBits;
  constexpr int64_t kMost = int64_t{1} << 30;  // scores at a time: uint32 counts them for certain
  const int64_t all = s.rows.count(), size = s.values.element_size();
  const int64_t parts = std::clamp<int64_t>(all / kGrain, 1, torch::stable::get_num_threads()),
                part = (all + parts - 1) / parts;
  Ranking ranking{abs, s.element == kDouble ? 64 : 32, 0, 0, true};
  Cut cut{0, keep, 0};
  while (ranking.shift > 0) {
    ranking.bits = std::min(kDigitBits, ranking.shift);
    ranking.shift -= ranking.bits;
    std::vector<std::vector<int64_t>> found(parts, std::vector<int64_t>(kDigits, 0));
    std::atomic<bool> nan{false};
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<uint32_t> counts(kTables * kDigits);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t stop = std::min(all, (p + 1) * part);
        for (int64_t from = p * part; from < stop; from += kMost) {
          std::fill(counts.begin(), counts.end(), 0);
          const char* first = bytes_of(s.values) + from * size;
          if (kernels().histogram[s.element](first, std::min(kMost, stop - from), ranking, counts.data())) nan = true;
          for (int64_t d = 0; d < kTables * kDigits; ++d) found[p][d % kDigits] += counts[d];
        }
      }
    });
    if (nan) refuse_nan(op, s);
    for (int64_t p = 1; p < parts; ++p) {
      for (int64_t d = 0; d < kDigits; ++d) found[0][d] += found[p][d];
    }
    int64_t digit = kDigits - 1;
    while (digit > 0 && found[0][digit] < cut.ties) cut.ties -= found[0][digit--];
    cut.equal = found[0][digit];
    ranking.above = ranking.above << ranking.bits | static_cast<uint64_t>(digit);
    ranking.highest = false;
  }
  cut.key = ranking.above;
  return cut;
}

Tensor topk_mask(const Tensor& scores, double density, bool abs) {
  const char* op = "topk_mask";
  require(density > 0 && density <= 1, op, ": density must lie in (0, 1], got ", density);
  const Scores s = scores_of(op, scores);
  const int64_t all = s.rows.count(), keep = all - static_cast<int64_t>((1 - density) * static_cast<double>(all));
  // A density can be so small that no score is kept.
  const Cut cut = all == 0 ? Cut{} : find_cut(op, s, abs, std::max<int64_t>(keep, 1));
  const auto select = kernels().select[s.element];
  std::vector<int64_t> ties(s.rows.n, s.rows.k);
  if (cut.ties < cut.equal || keep == 0) {
    // Ties go to the lowest indices: each row gets what the rows before it leave.
    for_rows(s.rows.n, s.rows.k, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) ties[n] = kernels().count_equal[s.element](s.row(n), s.rows.k, abs, cut.key);
    });
    int64_t left = keep == 0 ? 0 : cut.ties;
    for (int64_t& of_row : ties) {
      of_row = std::min(of_row, left);
      left -= of_row;
    }
  }
  return mask_of(op, s, [&](int64_t n, uint8_t* bits) {
    select(s.row(n), s.rows.k, abs, cut.key, ties[n], bits);
    return false;
  });
}

// ---- effective weights ---------------------------------------------------------------------------------------------------

enum class Rescale { none, dwr, dwr_grad };

Rescale rescale_of(const char* op, const std::string& word) {
  if (word.empty()) return Rescale::none;
  if (word == "dwr") return Rescale::dwr;
  require(word == "dwr_grad", op, ": rescale must be '', 'dwr' or 'dwr_grad', got '", word, "'");
  return Rescale::dwr_grad;
}

Slope slope_of(const char* op, const std::string& word) {
  if (word == "sigmoid") return kSigmoid;
  if (word == "sign") return kSign;
  require(word == "one", op, ": slope must be 'sigmoid', 'sign' or 'one', got '", word, "'");
  return kOne;
}

int64_t count_ones(const Tensor& bits, const Rows& rows) {
  const uint8_t* in = static_cast<const uint8_t*>(bits.const_data_ptr());
  std::atomic<int64_t> total{0};
  for_rows(rows.n, row_bytes(rows.k), [&](int64_t begin, int64_t end) {
    int64_t part = 0;
    for (int64_t n = begin; n < end; ++n) part += kernels().count(in + n * row_bytes(rows.k), rows.k);
    total += part;
  });
  return total;
}

// A weight that wears a mask, checked, and pieces of its effective weight.
struct Masked {
  Tensor weight;  // contiguous
  Tensor bits;
  Rows rows;
  Element element;
  std::optional<Scores> scores;
  bool is_signed = false;
  Rescale rescale = Rescale::none;
  double factor = 1;

  Masked(const char* op, const Tensor& w, const Tensor& b, const Optional& s, bool with_signs, const std::string& scale)
      : weight(dense(w)), bits(b), rows(rows_of(op, "weight", w)), element(element_of(w)), is_signed(with_signs) {
    require_floating(op, "weight", w);
    require_same_device(op, "bits", b, w);
    require_bits(op, "bits", b, rows.n, rows.k);
    rescale = rescale_of(op, scale);
    if (s) {
      require_same_device(op, "scores", *s, w);
      scores = scores_of(op, *s);
      require(scores->rows.n == rows.n && scores->rows.k == rows.k, op, ": scores ", shape_of(*s), " must have weight's shape ",
              shape_of(w));
    }
    require(!is_signed || scores, op, ": signed needs scores");
    if (rescale == Rescale::none || rows.count() == 0) return;
    const int64_t ones = count_ones(bits, rows);
    require(ones > 0, op, ": rescale divides by the number of kept weights, and none is kept; raise the scores or the density");
    factor = static_cast<double>(rows.count()) / static_cast<double>(ones);
  }

  const uint8_t* bits_row(int64_t n) const {
    return static_cast<const uint8_t*>(bits.const_data_ptr()) + n * row_bytes(rows.k);
  }
  const char* weight_at(int64_t n, int64_t k) const { return bytes_of(weight) + (n * rows.k + k) * weight.element_size(); }
  const char* score_at(int64_t n, int64_t k) const { return scores->row(n) + k * scores->values.element_size(); }

  // out = rows of `from`, which is weight or lies as it does, [begin, end) x [k, k + width), masked, signed and rescaled;
  // k is a multiple of 64.
  void apply(Apply kernel, const char* from, int64_t from_row, int64_t begin, int64_t end, int64_t k, int64_t width, char* out,
             int64_t out_row) const {
    std::vector<uint8_t> negative(is_signed ? row_bytes(width) : 0);
    for (int64_t n = begin; n < end; ++n) {
      if (is_signed) kernels().below[scores->element](score_at(n, k), 0.0, negative.data(), width);
      kernel(from + (n - begin) * from_row, bits_row(n) + k / 8, is_signed ? negative.data() : nullptr, factor,
             out + (n - begin) * out_row, width);
    }
  }
};

Apply apply_kernel(const char* op, const Tensor& from, const Tensor& to) {
  const Apply kernel = kernels().apply[element_of(from)][element_of(to)];
  require(kernel != nullptr, op, ": weight and result must both be float64, or neither");
  return kernel;
}

Tensor apply_mask(const Tensor& weight, const Tensor& bits, const Optional& scores, bool is_signed, std::string rescale,
                  ScalarType dtype) {
  const char* op = "_apply_mask";
  const Masked masked(op, weight, bits, scores, is_signed, rescale);
  require(
      dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float || dtype == ScalarType::Double,
      op, ": dtype must be float16, bfloat16, float32 or float64");
  const Tensor result = torch::stable::new_empty(masked.weight, masked.weight.sizes(), dtype);
  const Apply kernel = apply_kernel(op, weight, result);
  const int64_t k = masked.rows.k, from_row = k * weight.element_size(), out_row = k * result.element_size();
  for_rows(masked.rows.n, k, [&](int64_t begin, int64_t end) {
    masked.apply(kernel, masked.weight_at(begin, 0), from_row, begin, end, 0, k, mutable_bytes_of(result) + begin * out_row,
                 out_row);
  });
  return result;
}

// ---- conversion ----------------------------------------------------------------------------------------------------------

bool is_16_bit(const Tensor& x) { return x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16; }

constexpr int64_t kPiece = 1024;  // elements at a time where types are converted

// of_piece(first, n) for pieces of `all` elements.
template <typename OfPiece>
void for_pieces(int64_t all, const OfPiece& of_piece) {
  for_rows((all + kPiece - 1) / kPiece, kPiece, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kPiece; first < std::min(end * kPiece, all); first += kPiece) {
      of_piece(first, std::min(kPiece, all - first));
    }
  });
}

// A contiguous 16-bit tensor in float32.
Tensor widened(const Tensor& x) {
  const Tensor result = torch::stable::new_empty(x, x.sizes(), ScalarType::Float);
  for_pieces(x.numel(), [&](int64_t first, int64_t n) {
    kernels().widen[element_of(x)](bytes_of(x) + 2 * first, static_cast<float*>(result.mutable_data_ptr()) + first, n);
  });
  return result;
}

// And back, into `to`.
void narrow_into(const Tensor& x, const Tensor& to) {
  for_pieces(x.numel(), [&](int64_t first, int64_t n) {
    kernels().narrow[element_of(to)](static_cast<const float*>(x.const_data_ptr()) + first, mutable_bytes_of(to) + 2 * first,
                                     n);
  });
}

// ---- gradients -----------------------------------------------------------------------------------------------------------

// A piece of a row in the accumulation type T: where it lies, if it is of that type, else widened into `buffer`.
template <typename T>
const T* as(const char* from, Element element, T* buffer, int64_t n) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (element < kFloat) {
      kernels().widen[element](from, buffer, n);
      return buffer;
    }
  }
  return reinterpret_cast<const T*>(from);
}

// From the gradient of the effective weight, a tile at a time, those of weight and scores.
class MaskGradients {
 public:
  MaskGradients(const char* op, const Masked& m, const std::string& slope, bool of_weight, bool of_scores)
      : op_(op), m_(m), slope_(maskmm::slope_of(op, slope)) {
    require(!of_scores || m.scores, op, ": scores are wanted the gradient of, and there are none");
    require(!m.scores || (m.element == kDouble) == (m.scores->element == kDouble), op,
            ": weight and scores must both be float64, or neither");
    weight = of_weight ? torch::stable::empty_like(m.weight) : torch::stable::new_empty(m.weight, {0});
    scores = of_scores ? torch::stable::empty_like(m.scores->values) : torch::stable::new_empty(m.weight, {0});
    of_weight_ = of_weight, of_scores_ = of_scores;
    // What finish adds to is not rounded before.
    unfinished_ = of_scores && m.rescale == Rescale::dwr_grad && is_16_bit(scores)
                      ? torch::stable::new_empty(scores, scores.sizes(), ScalarType::Float)
                      : scores;
    if (m.rescale == Rescale::dwr_grad && of_scores) dots_.assign(m.rows.n, 0.0);
  }

  // The one gradient that is wanted, if it is of this type and [N, K]: what `add` takes may lie there, and is worked on in
  // place.
  Optional home(ScalarType type) const {
    const Tensor& only = of_weight_ ? weight : scores;
    if (of_weight_ == of_scores_ || only.scalar_type() != type || only.dim() != 2) return std::nullopt;
    return only;
  }

  // grad [rows, K], contiguous: rows first, first + 1, … of the effective weight's gradient.
  void add(const Tensor& grad, int64_t first) {
    if (m_.element == kDouble) {
      add_as<double>(grad, first, kernels().doubles);
    } else {
      add_as<float>(grad, first, kernels().floats);
    }
  }

  // After the last tile.
  void finish() {
    if (dots_.empty()) return;
    double dot = 0;
    for (const double of_row : dots_) dot += of_row;
    const double number = -dot * m_.factor * m_.factor / static_cast<double>(m_.rows.count());
    if (m_.element == kDouble) {
      finish_as<double>(number, kernels().doubles);
    } else {
      finish_as<float>(number, kernels().floats);
      if (is_16_bit(scores)) narrow_into(unfinished_, scores);
    }
  }

  Tensor weight, scores;

 private:
  char* score_grad_at(int64_t n, int64_t k) const {
    return mutable_bytes_of(unfinished_) + (n * m_.rows.k + k) * unfinished_.element_size();
  }

  template <typename T>
  void add_as(const Tensor& grad, int64_t first, const Gradients<T>& g) {
    const Element of_grad = element_of(grad);
    const int64_t k = m_.rows.k, step = grad.element_size();
    const Apply kernel = of_weight_ ? apply_kernel(op_, grad, weight) : nullptr;
    require((of_grad == kDouble) == (m_.element == kDouble), op_, ": grad and weight must both be float64, or neither");
    for_rows(grad.size(0), k, [&](int64_t begin, int64_t end) {
      const char* from = bytes_of(grad) + begin * k * step;
      if (of_weight_) {
        const int64_t row = k * weight.element_size();
        m_.apply(kernel, from, k * step, first + begin, first + end, 0, k, mutable_bytes_of(weight) + (first + begin) * row,
                 row);
      }
      if (!of_scores_) return;
      const Element of_score = m_.scores->element;
      const bool convert = is_16_bit(unfinished_);
      std::vector<T> buffer(4 * kPiece);
      for (int64_t n = first + begin; n < first + end; ++n, from += k * step) {
        for (int64_t i = 0; i < k; i += kPiece) {
          const int64_t count = std::min(kPiece, k - i);
          const T* gradients = as<T>(from + i * step, of_grad, buffer.data(), count);
          const T* weights = as<T>(m_.weight_at(n, i), m_.element, buffer.data() + kPiece, count);
          const T* values = as<T>(m_.score_at(n, i), of_score, buffer.data() + 2 * kPiece, count);
          T* out = convert ? buffer.data() + 3 * kPiece : reinterpret_cast<T*>(score_grad_at(n, i));
          const T dot =
              g.of_scores(gradients, weights, values, m_.bits_row(n) + i / 8, slope_, static_cast<T>(m_.factor), out, count);
          if (convert) narrow(out, of_score, score_grad_at(n, i), count);
          if (!dots_.empty()) dots_[n] += dot;
        }
      }
    });
  }

  template <typename T>
  void finish_as(double number, const Gradients<T>& g) {
    const int64_t width = m_.rows.k;
    const Element of_score = m_.scores->element;
    for_rows(m_.rows.n, width, [&](int64_t begin, int64_t end) {
      std::vector<T> buffer(kPiece);
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t i = 0; i < width; i += kPiece) {
          const int64_t count = std::min(kPiece, width - i);
          const T* values = as<T>(m_.score_at(n, i), of_score, buffer.data(), count);
          g.add_slope(values, slope_, static_cast<T>(number), reinterpret_cast<T*>(score_grad_at(n, i)), count);
        }
      }
    });
  }

  template <typename T>
  static void narrow(const T* from, Element element, char* to, int64_t n) {
    if constexpr (sizeof(T) == sizeof(float)) kernels().narrow[element](from, to, n);
  }

  const char* op_;
  const Masked& m_;
  Slope slope_;
  bool of_weight_ = false, of_scores_ = false;
  std::vector<double> dots_;
  Tensor unfinished_;
};

std::tuple<Tensor, Tensor> mask_gradients(const Tensor& grad, const Tensor& weight, const Tensor& bits, const Optional& scores,
                                          std::string slope, bool is_signed, std::string rescale, std::vector<bool> wanted) {
  const char* op = "_mask_gradients";
  const Masked masked(op, weight, bits, scores, is_signed, rescale);
  require_floating(op, "grad", grad);
  require_same_device(op, "grad", grad, weight);
  const Rows rows = rows_of(op, "grad", grad);
  require(rows.n == masked.rows.n && rows.k == masked.rows.k, op, ": grad ", shape_of(grad), " must have weight's shape ",
          shape_of(weight));
  require(wanted.size() == 2, op, ": wanted must be two bools");
  MaskGradients gradients(op, masked, slope, wanted[0], wanted[1]);
  gradients.add(torch::stable::view(dense(grad), {rows.n, rows.k}), 0);
  gradients.finish();
  return {gradients.weight, gradients.scores};
}

// ---- products ------------------------------------------------------------------------------------------------------------

// Bytes of a tile of an effective weight or of its gradient: it is made in the caches and read from there.
// Tiles of columns are larger, because their rows are short and far apart.
constexpr int64_t kRowTileBytes = int64_t{6} << 20, kColumnTileBytes = int64_t{8} << 20;

// Rows or columns of a tile, of `length` elements each; a multiple of 64, or all there are. Whatever the number of threads:
// GEMM's bits depend on its sizes.
int64_t tile_of(int64_t bytes, int64_t length, int64_t element_size, int64_t all) {
  const int64_t fitting = bytes / std::max<int64_t>(1, length * element_size) / 64 * 64;
  return std::min(std::max<int64_t>(fitting, 64), all);
}

// x[.., begin : begin + length, ..] along a dimension; x itself where that is all of it.
Tensor part_of(const Tensor& x, int64_t dim, int64_t begin, int64_t length) {
  if (length == x.size(dim)) return x;
  Tensor whole = x;
  return torch::stable::narrow(whole, dim, begin, length);
}

// [.., K] as [M, K], with rows that GEMM can read.
Tensor flat(const Tensor& x, int64_t k) {
  if (x.dim() == 2) return dense(x);
  int64_t m = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) m *= x.size(d);
  return torch::stable::view(dense(x), {m, k});
}

std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes.push_back(x.size(d));
  sizes.push_back(last);
  return sizes;
}

void require_product(const char* op, const char* name, const Tensor& x, const Masked& masked, int64_t last) {
  require_floating(op, name, x);
  require_same_device(op, name, x, masked.weight);
  require(masked.weight.dim() == 2, op, ": weight must be [N, K], got ", shape_of(masked.weight));
  require(x.dim() >= 1 && x.size(x.dim() - 1) == last, op, ": ", name, " must be [.., ", last, "], got ", shape_of(x));
  require((x.scalar_type() == ScalarType::Double) == (masked.element == kDouble), op, ": ", name,
          " and weight must both be float64, or neither");
}

Tensor masked_linear(const Tensor& x, const Tensor& weight, const Tensor& bits, const Optional& bias, const Optional& scores,
                     std::string slope, bool is_signed, std::string rescale) {
  const char* op = "_masked_linear";
  const Masked masked(op, weight, bits, scores, is_signed, rescale);
  const auto [n, k] = masked.rows;
  require_product(op, "x", x, masked, k);
  slope_of(op, slope);
  if (bias) {
    require_same_device(op, "bias", *bias, x);
    require(bias->dim() == 1 && bias->size(0) == n && bias->scalar_type() == x.scalar_type(), op, ": bias must be [", n,
            "] of the type of x, got ", shape_of(*bias));
  }
  const Tensor result = torch::stable::new_empty(x, with_last(x, n));
  if (result.numel() == 0) return result;
  Tensor x2 = flat(x, k), y = flat(result, n);
  Optional addend = bias;
  // A rescaled weight is no number of its 16-bit type.
  const bool wide = is_16_bit(x) && masked.rescale != Rescale::none && weight.scalar_type() == x.scalar_type();
  if (wide) {
    x2 = widened(x2);
    y = torch::stable::new_empty(x2, {x2.size(0), n});
    if (bias) addend = widened(dense(*bias));
  }
  const int64_t tile = tile_of(kRowTileBytes, k, x2.element_size(), n), row = k * x2.element_size();
  Tensor scratch = torch::stable::new_empty(x2, {tile, k});
  const Apply kernel = apply_kernel(op, weight, scratch);
  for (int64_t first = 0; first < n; first += tile) {
    const int64_t rows = std::min(tile, n - first);
    for_rows(rows, k, [&](int64_t begin, int64_t end) {
      masked.apply(kernel, masked.weight_at(first + begin, 0), k * weight.element_size(), first + begin, first + end, 0, k,
                   mutable_bytes_of(scratch) + begin * row, row);
    });
    const Optional part = addend ? Optional(part_of(*addend, 0, first, rows)) : std::nullopt;
    aten::linear_out(x2, part_of(scratch, 0, 0, rows), part, part_of(y, 1, first, rows));
  }
  if (wide) narrow_into(y, result);
  return result;
}

std::tuple<Tensor, Tensor, Tensor> masked_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                          const Tensor& bits, const Optional& scores, std::string slope,
                                                          bool is_signed, std::string rescale, std::vector<bool> wanted) {
  const char* op = "_masked_linear_backward";
  const Masked masked(op, weight, bits, scores, is_signed, rescale);
  const auto [n, k] = masked.rows;
  require_product(op, "x", x, masked, k);
  require_product(op, "grad", grad, masked, n);
  require(grad.scalar_type() == x.scalar_type(), op, ": grad must be of the type of x");
  require(wanted.size() == 3, op, ": wanted must be three bools");
  MaskGradients gradients(op, masked, slope, wanted[1], wanted[2]);
  const Tensor x2 = flat(x, k), grad2 = flat(grad, n);
  require(x2.size(0) == grad2.size(0), op, ": grad ", shape_of(grad), " and x ", shape_of(x), " must have the same rows");
  const Tensor of_x = wanted[0] ? torch::stable::new_empty(x, x.sizes()) : torch::stable::new_empty(x, {0});
  Tensor of_x2 = wanted[0] ? flat(of_x, k) : of_x;
  if (weight.numel() == 0) {
    if (wanted[0]) torch::stable::zero_(of_x2);
    return {of_x, gradients.weight, gradients.scores};
  }
  const bool narrow = is_16_bit(x) && weight.scalar_type() == x.scalar_type();
  // A rescaled weight is no number of its 16-bit type, and a gradient that is worked on is not rounded before.
  const bool wide_x = narrow && wanted[0] && masked.rescale != Rescale::none;
  const bool wide_weight = narrow && (wanted[2] || (wanted[1] && masked.rescale != Rescale::none));
  const Tensor wide_grad = wide_x || wide_weight ? widened(grad2) : grad2;
  const Optional home = gradients.home(wide_weight ? ScalarType::Float : x2.scalar_type());
  if (wanted[0]) {
    const Tensor of = wide_x ? torch::stable::new_empty(wide_grad, of_x2.sizes()) : of_x2;
    const int64_t tile = tile_of(kColumnTileBytes, n, of.element_size(), k), row = tile * of.element_size();
    const bool fits = home && tile == k && home->scalar_type() == of.scalar_type();
    const Tensor scratch = fits ? *home : torch::stable::new_empty(of, {n, tile});
    const Apply kernel = apply_kernel(op, weight, scratch);
    for (int64_t first = 0; first < k; first += tile) {
      const int64_t columns = std::min(tile, k - first);
      for_rows(n, columns, [&](int64_t begin, int64_t end) {
        masked.apply(kernel, masked.weight_at(begin, first), k * weight.element_size(), begin, end, first, columns,
                     mutable_bytes_of(scratch) + begin * row, row);
      });
      aten::mm_out(wide_x ? wide_grad : grad2, part_of(scratch, 1, 0, columns), part_of(of, 1, first, columns));
    }
    if (wide_x) narrow_into(of, of_x);
  }
  if (wanted[1] || wanted[2]) {
    const Tensor from = wide_weight ? widened(x2) : x2;
    const int64_t tile = tile_of(kRowTileBytes, k, from.element_size(), n);
    const Tensor across = torch::stable::transpose(wide_weight ? wide_grad : grad2, 0, 1);
    const Tensor scratch = home ? *home : torch::stable::new_empty(from, {tile, k});
    for (int64_t first = 0; first < n; first += tile) {
      const int64_t rows = std::min(tile, n - first);
      const Tensor part = part_of(scratch, 0, home ? first : 0, rows);
      aten::mm_out(part_of(across, 0, first, rows), from, part);
      gradients.add(part, first);
    }
  }
  gradients.finish();
  return {of_x, gradients.weight, gradients.scores};
}

}  // namespace
}  // namespace maskmm
}  // namespace fourfold

STABLE_TORCH_LIBRARY_IMPL(fourfold, CPU, m) {
  using namespace fourfold::maskmm;
  m.impl("pack_mask", TORCH_BOX(&pack_mask));
  m.impl("unpack_mask", TORCH_BOX(&unpack_mask));
  m.impl("bernoulli_mask", TORCH_BOX(&bernoulli_mask));
  m.impl("topk_mask", TORCH_BOX(&topk_mask));
  m.impl("threshold_mask", TORCH_BOX(&threshold_mask));
  m.impl("_apply_mask", TORCH_BOX(&apply_mask));
  m.impl("_mask_gradients", TORCH_BOX(&mask_gradients));
  m.impl("_masked_linear", TORCH_BOX(&masked_linear));
  m.impl("_masked_linear_backward", TORCH_BOX(&masked_linear_backward));
}
