// The kernels of every tier that this processor runs, against naive loops in double, without torch and Python: block DCT here,
// rgb_to_dct in kernels_rgb.h, CoordConv in kernels_coordconv.h, masks in kernels_maskmm.h, similarity in kernels_cca.h.
// Buffers have exactly the size that is needed, so that a stray access is seen. For one tier:
//
//   g++ -std=c++17 -O0 -g -fsanitize=address,undefined -march=x86-64-v3 -DFOURFOLD_ISA=avx2 -Icsrc
//     csrc/*/*kernels.cpp csrc/common/isa.cpp tests/kernels_main.cpp -o kernels_main
//
// Without FOURFOLD_ISA it wants the kernels of every tier, each compiled with its own flags: .ci/kernel_driver.sh does that.
#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "blockdct/kernels.h"
#include "blockdct/rgb.h"
#include "cca/kernels.h"
#include "cca/spectra_kernels.h"
#include "common/isa.h"
#include "coordconv/kernels.h"
#include "maskmm/kernels.h"

#define DECLARE(tier)                                \
  namespace fourfold::tier {                         \
  extern const blockdct::Kernels blockdct_kernels;   \
  extern const rgbdct::Kernels rgbdct_kernels;       \
  extern const coordconv::Kernels coordconv_kernels; \
  extern const maskmm::Kernels maskmm_kernels;       \
  extern const sampling::Kernels sampling_kernels;   \
  extern const cca::Kernels cca_kernels;             \
  extern const spectra::Kernels spectra_kernels;     \
  }
#define ENTRY(tier)                    \
  {fourfold::Tier::tier,               \
   &fourfold::tier::blockdct_kernels,  \
   &fourfold::tier::rgbdct_kernels,    \
   &fourfold::tier::coordconv_kernels, \
   &fourfold::tier::maskmm_kernels,    \
   &fourfold::tier::sampling_kernels,  \
   &fourfold::tier::cca_kernels,       \
   &fourfold::tier::spectra_kernels}
#if defined(FOURFOLD_ISA)
DECLARE(FOURFOLD_ISA)
#elif defined(__x86_64__)
DECLARE(baseline)
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512_bf16)
#elif defined(__aarch64__)
DECLARE(neon)
#else
DECLARE(baseline)
#endif

namespace {

using namespace fourfold::blockdct;
using fourfold::Element, fourfold::kElements, fourfold::kHalf, fourfold::kBFloat16, fourfold::kFloat, fourfold::kDouble;

const struct {
  fourfold::Tier tier;
  const Kernels* kernels;
  const fourfold::rgbdct::Kernels* rgb;
  const fourfold::coordconv::Kernels* coordconv;
  const fourfold::maskmm::Kernels* maskmm;
  const fourfold::sampling::Kernels* sampling;
  const fourfold::cca::Kernels* cca;
  const fourfold::spectra::Kernels* spectra;
} kTiers[] = {
#if defined(FOURFOLD_ISA)
    ENTRY(FOURFOLD_ISA),
#elif defined(__x86_64__)
    ENTRY(baseline),
    ENTRY(avx2),
    ENTRY(avx512),
    ENTRY(avx512_bf16),
#elif defined(__aarch64__)
    ENTRY(neon),
#else
    ENTRY(baseline),
#endif
};

constexpr int kBlockSize[kBlockSizes] = {2, 4, 8, 16, 32};
constexpr const char* kElementName[kElements] = {"float16", "bfloat16", "float32", "float64"};
constexpr int kBytes[kElements] = {2, 2, 4, 8};
// Half a unit in the last place of the element, and the rounding of what it is computed in.
constexpr double kRelative[kElements] = {0x1p-11, 0x1p-8, 1e-6, 1e-14};
constexpr double kAbsolute[kElements] = {4e-6, 4e-6, 4e-6, 1e-14};

long checked = 0, failed = 0;

// ---- elements as doubles -------------------------------------------------------------------------------------------------

// value is one that the element holds exactly.
void encode(Element element, double value, void* to) {
  const float single = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &single, 4);
  const uint16_t brain = static_cast<uint16_t>(bits >> 16);
  const uint16_t half = static_cast<uint16_t>((bits >> 16 & 0x8000) |
                                              (value == 0 ? 0 : ((bits >> 23 & 0xff) - 112) << 10 | (bits >> 13 & 0x3ff)));
  if (element == kHalf) std::memcpy(to, &half, 2);
  if (element == kBFloat16) std::memcpy(to, &brain, 2);
  if (element == kFloat) std::memcpy(to, &single, 4);
  if (element == kDouble) std::memcpy(to, &value, 8);
}

double decode(Element element, const void* from) {
  uint16_t bits;
  std::memcpy(&bits, from, 2);
  if (element == kHalf) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
    const double magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                             : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                            : std::ldexp(mantissa, -24);
    return bits & 0x8000 ? -magnitude : magnitude;
  }
  float single;
  if (element == kBFloat16) {
    const uint32_t wide = uint32_t{bits} << 16;
    std::memcpy(&single, &wide, 4);
    return single;
  }
  if (element == kFloat) {
    std::memcpy(&single, from, 4);
    return single;
  }
  double value;
  std::memcpy(&value, from, 8);
  return value;
}

uint32_t state = 1;
int random_below(int n) {
  state = state * 1664525u + 1013904223u;
  return static_cast<int>((state >> 8) % static_cast<uint32_t>(n));
}
// Exact in every element type.
double random_value() { return (random_below(255) - 127) / 16.0; }

constexpr double kUntouched = 3.0;

// Exactly `bytes` bytes before a page that can't be touched: what runs over their end faults, also where AddressSanitizer
// doesn't look, in masked loads and stores, and where there is none. What lies before them is poisoned for it.
struct Memory {
  char *pages, *begin, *end;
  explicit Memory(int64_t bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page;
    pages = static_cast<char*>(mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (pages == MAP_FAILED) std::abort();
    end = pages + room, begin = end - bytes;
    if (mprotect(end, page, PROT_NONE) != 0) std::abort();
    ASAN_POISON_MEMORY_REGION(pages, begin - pages);
  }
  Memory(Memory&& from) noexcept : pages(from.pages), begin(from.begin), end(from.end) { from.pages = nullptr; }
  ~Memory() {
    if (pages == nullptr) return;
    ASAN_UNPOISON_MEMORY_REGION(pages, begin - pages);
    munmap(pages, end - pages + sysconf(_SC_PAGESIZE));
  }
};

// Memory of exactly `count` elements.
struct Buffer {
  Element element;
  int64_t count;
  Memory memory;
  Buffer(Element e, int64_t n) : element(e), count(n), memory(n * kBytes[e]) {
    for (int64_t i = 0; i < n; ++i) encode(e, kUntouched, at(i));
  }
  char* at(int64_t i) { return memory.begin + i * kBytes[element]; }
  double get(int64_t i) { return decode(element, at(i)); }
};

// Where the values of a result must lie, and what they must be.
struct Expected {
  std::vector<int64_t> place;
  std::vector<double> value;
  double largest = 1;  // of what is added up to a value
};

void compare(const char* what, Buffer& result, const Expected& expected) {
  double largest = expected.largest;
  for (double value : expected.value) largest = std::max(largest, std::fabs(value));
  std::vector<char> written(result.count, 0);
  const char* problem = nullptr;
  for (size_t i = 0; i < expected.place.size(); ++i) {
    const double got = result.get(expected.place[i]), want = expected.value[i];
    written[expected.place[i]] = 1;
    const double allowed = kRelative[result.element] * std::fabs(want) + kAbsolute[result.element] * largest;
    if (!(std::fabs(got - want) <= allowed)) problem = "wrong value";
  }
  for (int64_t i = 0; i < result.count; ++i) {
    if (!written[i] && result.get(i) != kUntouched) problem = "wrote beside the result";
  }
  ++checked;
  if (problem != nullptr && ++failed <= 20) std::printf("%s: %s\n", what, problem);
}

// ---- transforms ----------------------------------------------------------------------------------------------------------

// The orthonormal DCT-II as a matrix D[u][k]; made once a size, since emulated cosines take most of the time otherwise.
const std::vector<double>& dct_matrix(int n) {
  static std::map<int, std::vector<double>> made;
  std::vector<double>& matrix = made[n];
  for (int at = static_cast<int>(matrix.size()); at < n * n; ++at) {
    const int u = at / n, k = at % n;
    matrix.push_back(std::sqrt((u ? 2.0 : 1.0) / n) * std::cos(std::acos(-1.0) * (2 * k + 1) * u / (2 * n)));
  }
  return matrix;
}

// out[u] = sum over k of D[u][k] in[k]; or with its transpose.
void naive(int n, const double* in, double* out, int step, bool inverse) {
  const double* matrix = dct_matrix(n).data();
  for (int a = 0; a < n; ++a) {
    double sum = 0;
    for (int b = 0; b < n; ++b) sum += in[b * step] * (inverse ? matrix[b * n + a] : matrix[a * n + b]);
    out[a * step] = sum;
  }
}
void naive_2d(int n, std::vector<double>& block, bool inverse) {
  std::vector<double> half(n * n);
  for (int x = 0; x < n; ++x) naive(n, &block[x], &half[x], n, inverse);
  for (int y = 0; y < n; ++y) naive(n, &half[y * n], &block[y * n], 1, inverse);
}

struct Case {
  Element element;
  int size_index;
  int64_t height, width;
  Form form;
  Edge edge;
  int every;                   // keep each frequency that this divides
  int64_t image_col, row_gap;  // strides of the image: a column's step, and elements between rows
  bool scaled, stream;
  double shift;
};

struct Layout {
  Plane plane{};
  std::vector<int16_t> slots;
  int64_t image_count, coef_count;
  // Where coefficient f = u*N + v of block (i, j) lies, or -1.
  int64_t place(int n, int64_t i, int64_t j, int f) const {
    if (plane.form == Form::pixels) return (i * n + f / n) * plane.coef_u + (j * n + f % n) * plane.coef_v;
    return slots[f] < 0 ? -1 : i * plane.coef_i + j * plane.coef_j + slots[f] * plane.coef_f;
  }
};

Layout layout_of(const Case& c) {
  Layout layout;
  const int n = kBlockSize[c.size_index], all = n * n;
  Plane& p = layout.plane;
  p.height = c.height, p.width = c.width;
  p.rows = (c.height + n - 1) / n, p.cols = (c.width + n - 1) / n;
  p.image_col = c.image_col, p.image_row = c.width * c.image_col + c.row_gap;
  p.form = c.form, p.edge = c.edge, p.shift = c.shift, p.stream = p.large = c.stream;
  p.in_order = c.form == Form::pixels || c.every == 1;
  layout.slots.assign(all, -1);
  for (int k = 0; k < all; ++k) {
    const int f = p.in_order ? k : all - 1 - k;  // where some are dropped, the rest come in reverse order
    if (p.in_order || f % c.every == 0) layout.slots[f] = static_cast<int16_t>(p.kept++);
  }
  if (c.form == Form::plane) {
    p.coef_j = 1, p.coef_i = p.cols, p.coef_f = p.rows * p.cols + (c.row_gap ? 1 : 0);
  } else if (c.form == Form::block) {
    p.coef_f = 1, p.coef_j = p.kept + c.row_gap, p.coef_i = p.cols * p.coef_j + c.row_gap;
  } else {
    p.coef_v = c.image_col, p.coef_u = p.cols * n * p.coef_v + c.row_gap;
    p.coef_i = n * p.coef_u, p.coef_j = n * p.coef_v;
  }
  layout.image_count = (c.height - 1) * p.image_row + (c.width - 1) * p.image_col + 1;
  layout.coef_count = 0;
  for (int f = 0; f < all; ++f) {
    layout.coef_count = std::max(layout.coef_count, layout.place(n, p.rows - 1, p.cols - 1, f) + 1);
  }
  return layout;
}

Buffer scale_of(const Case& c, std::vector<double>& values) {
  const int all = kBlockSize[c.size_index] * kBlockSize[c.size_index];
  Buffer scale(c.element == kDouble ? kDouble : kFloat, all);
  for (int f = 0; f < all; ++f) {
    values.push_back(c.scaled ? (f % 5 + 1) / 2.0 : 1.0);
    encode(scale.element, values.back(), scale.at(f));
  }
  return scale;
}

// In two runs of blocks, as two threads would.
template <typename Function>
void run(const Kernels& kernels, const Case& c, const Layout& l, Function function, Buffer& from, Buffer& to, Buffer& scale) {
  const int64_t per_tile = kernels.tile_blocks[c.element][c.size_index], blocks = l.plane.rows * l.plane.cols;
  const int64_t split = (blocks / per_tile + 1) / 2 * per_tile;
  const void* factors = c.scaled ? scale.at(0) : nullptr;
  Plane plane = l.plane;
  plane.slots = l.slots.data();
  function(plane, from.at(0), to.at(0), factors, 0, std::min(split, blocks));
  if (split < blocks) function(plane, from.at(0), to.at(0), factors, split, blocks);
}

void test_forward(const Kernels& kernels, const Case& c, const char* what) {
  const int n = kBlockSize[c.size_index];
  const Layout l = layout_of(c);
  std::vector<double> factors;
  Buffer scale = scale_of(c, factors), image(c.element, l.image_count), coefs(c.element, l.coef_count);
  for (int64_t i = 0; i < l.image_count; ++i) encode(c.element, random_value(), image.at(i));
  run(kernels, c, l, kernels.forward[c.element][c.size_index], image, coefs, scale);
  Expected expected;
  std::vector<double> block(n * n);
  for (int64_t i = 0; i < l.plane.rows; ++i) {
    for (int64_t j = 0; j < l.plane.cols; ++j) {
      for (int f = 0; f < n * n; ++f) {
        const int64_t y = i * n + f / n, x = j * n + f % n;
        const bool outside = y >= c.height || x >= c.width;
        const int64_t at = std::min(y, c.height - 1) * l.plane.image_row + std::min(x, c.width - 1) * l.plane.image_col;
        block[f] = outside && c.edge == Edge::zeros ? 0 : image.get(at) + c.shift;
      }
      naive_2d(n, block, false);
      for (int f = 0; f < n * n; ++f) {
        if (l.place(n, i, j, f) < 0) continue;
        expected.place.push_back(l.place(n, i, j, f));
        expected.value.push_back(block[f] * factors[f]);
      }
    }
  }
  compare(what, coefs, expected);
}

void test_inverse(const Kernels& kernels, const Case& c, const char* what) {
  const int n = kBlockSize[c.size_index];
  const Layout l = layout_of(c);
  std::vector<double> factors;
  Buffer scale = scale_of(c, factors), image(c.element, l.image_count), coefs(c.element, l.coef_count);
  for (int64_t i = 0; i < l.coef_count; ++i) encode(c.element, random_value(), coefs.at(i));
  run(kernels, c, l, kernels.inverse[c.element][c.size_index], coefs, image, scale);
  Expected expected;
  std::vector<double> pixels(c.height * c.width, 0.0), sizes = pixels, block(n * n);
  for (int64_t i = 0; i < l.plane.rows; ++i) {
    for (int64_t j = 0; j < l.plane.cols; ++j) {
      for (int f = 0; f < n * n; ++f) {
        const int64_t at = l.place(n, i, j, f);
        block[f] = at < 0 ? 0 : coefs.get(at) * factors[f];
      }
      naive_2d(n, block, true);
      for (int f = 0; f < n * n; ++f) {
        const int64_t y = i * n + f / n, x = j * n + f % n;
        const bool outside = y >= c.height || x >= c.width;
        if (outside && c.edge == Edge::crop) continue;
        const int64_t pixel = std::min(y, c.height - 1) * c.width + std::min(x, c.width - 1);
        pixels[pixel] += block[f] - c.shift;
        expected.largest = std::max(expected.largest, sizes[pixel] += std::fabs(block[f]));
      }
    }
  }
  for (int64_t y = 0; y < c.height; ++y) {
    for (int64_t x = 0; x < c.width; ++x) expected.place.push_back(y * l.plane.image_row + x * l.plane.image_col);
  }
  expected.value = pixels;
  compare(what, image, expected);
}

void test_transforms(const Kernels& kernels, const char* tier) {
  for (int e = 0; e < kElements; ++e) {
    for (int s = 0; s < kBlockSizes; ++s) {
      const int64_t n = kBlockSize[s];
      const int64_t many = n <= 8 ? 4096 / (n * n) + 5 : 9;  // blocks across: more than a tile, and not a multiple of a vector
      const int64_t sizes[][2] = {{1, 1}, {n, n}, {n + 1, 3 * n - 1}, {2 * n - 1, 28 * n}, {n, many * n - 1}, {9 * n, 1}};
      for (const auto& size : sizes) {
        if (n == 32 && size[1] == 28 * n && e != kFloat) continue;  // the naive transform takes its time
        for (Form form : {Form::plane, Form::block, Form::pixels}) {
          for (int variant = 0; variant < 4; ++variant) {
            Case c{};
            c.element = static_cast<Element>(e), c.size_index = s, c.height = size[0], c.width = size[1], c.form = form;
            c.every = variant == 1 ? 3 : 1;
            c.image_col = variant == 2 ? 3 : 1;
            c.row_gap = variant == 3 ? 2 : 0;
            c.scaled = variant % 2 == 1;
            c.stream = variant == 3;
            char what[200];
            for (Edge edge : {Edge::replicate, Edge::zeros, Edge::crop, Edge::fold}) {
              c.edge = edge;
              const bool adjoint = edge == Edge::zeros || edge == Edge::fold;
              const bool forward = edge == Edge::replicate || edge == Edge::zeros;
              c.shift = adjoint ? 0 : 0.5;
              std::snprintf(what, sizeof what, "%s %s %s N=%d %dx%d form %d edge %d variant %d", tier,
                            forward ? "forward" : "inverse", kElementName[e], static_cast<int>(n), static_cast<int>(size[0]),
                            static_cast<int>(size[1]), static_cast<int>(form), static_cast<int>(edge), variant);
              forward ? test_forward(kernels, c, what) : test_inverse(kernels, c, what);
            }
          }
        }
      }
    }
  }
}

// ---- dct_normalize -------------------------------------------------------------------------------------------------------

void test_normalize(const Kernels& kernels, const char* tier) {
  for (int e = 0; e < kElements; ++e) {
    for (int64_t blocks : {1, 3, 16, 65, 130}) {
      for (int variant = 0; variant < 12; ++variant) {
        const bool planar = variant % 2 == 0, stream = variant >= 6;
        const int kind = variant % 6 / 2, every = kind == 0 ? 1 : kind == 1 ? 3 : 64;
        const Element element = static_cast<Element>(e), work = element == kDouble ? kDouble : kFloat;
        std::vector<int16_t> slots(64, -1);
        int64_t kept = 0;
        for (int f = 0; f < 64; ++f) {
          const int frequency = kind == 0 ? f : 63 - f;  // in order, or not
          if (frequency % every == 0) slots[frequency] = static_cast<int16_t>(kept++);
        }
        // Off by one: nothing aligns them to more than an element.
        std::unique_ptr<int16_t[]> storage(new int16_t[blocks * 64 + 1]);
        int16_t* const coefs = storage.get() + 1;
        for (int64_t i = 0; i < blocks * 64; ++i) coefs[i] = static_cast<int16_t>(random_below(401) - 200);
        coefs[0] = 32767, coefs[blocks * 64 - 1] = -32768;
        Buffer table(work, 64), mean(work, 64), factor(work, 64), out(element, blocks * kept);
        for (int f = 0; f < 64; ++f) {
          encode(work, f % 63 ? 1 + random_below(20) : 1, table.at(f));
          encode(work, random_value(), mean.at(f));
          encode(work, (1 + random_below(8)) / 16.0, factor.at(f));
        }
        const Normalize n{table.at(0), mean.at(0), factor.at(0), slots.data(), kept, planar, stream, blocks};
        // Backwards, as the blocks of a mirrored row lie.
        std::vector<const int16_t*> where;
        for (int64_t k = 0; k < blocks; ++k) where.push_back(coefs + (blocks - 1 - k) * 64);
        const int64_t split = blocks > 64 ? 64 : blocks;
        kernels.normalize[e](n, where.data(), out.at(0), 0, split);
        if (split < blocks) kernels.normalize[e](n, where.data() + split, out.at(0), split, blocks);
        Expected expected;
        for (int64_t k = 0; k < blocks; ++k) {
          for (int f = 0; f < 64; ++f) {
            if (slots[f] < 0) continue;
            expected.place.push_back(planar ? slots[f] * blocks + k : k * kept + slots[f]);
            expected.value.push_back((where[k][f] * table.get(f) - mean.get(f)) * factor.get(f));
          }
        }
        char what[200];
        std::snprintf(what, sizeof what, "%s normalize %s %d blocks variant %d", tier, kElementName[e],
                      static_cast<int>(blocks), variant);
        compare(what, out, expected);
      }
    }
  }
}

}  // namespace

#include "kernels_cca.h"
#include "kernels_coordconv.h"
#include "kernels_maskmm.h"
#include "kernels_rgb.h"

int main() {
  for (const auto& [tier, kernels, rgb, coordconv, maskmm, sampling, cca, spectra] : kTiers) {
    const char* name = fourfold::name_of(tier);
    if (tier > fourfold::machine_tier()) {
      std::printf("%s: not run, this processor lacks it\n", name);
      continue;
    }
    checked = failed = 0;
    test_transforms(*kernels, name);
    test_normalize(*kernels, name);
    test_rgb(*rgb, name);
    test_coordconv(*coordconv, name);
    test_maskmm(*maskmm, *sampling, name);
    test_cca(*cca, name);
    test_spectra(*spectra, name);
    std::printf("%s: %ld comparisons, %ld failed\n", name, checked, failed);
    if (failed) return 1;
  }
  return 0;
}
