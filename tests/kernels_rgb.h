// The kernels of rgb_to_dct of one tier against loops in double; part of kernels_main.cpp, whose Buffer, Expected and compare
// it uses.
#pragma once

namespace {

namespace rgbdct = fourfold::rgbdct;

constexpr const char* kPixelName[rgbdct::kPixels] = {"uint8", "float16", "bfloat16", "float32", "float64"};

struct RGBCase {
  int64_t height, width, v, h;
  rgbdct::Pixel pixel;
  Element element;
  Form form;
  bool interleaved, scaled;
  int every;           // keep each frequency that this divides
  int64_t gap;         // elements between rows, channels, blocks and frequencies
  int64_t tile;        // blocks of luma in a tile at most
  bool last_to_first;  // the order of tiles: what one writes beside its own part, a later one may hide
};

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of one component as they should come out, before scale: coefficient f of block k at [64 k + f].
struct Component {
  int64_t rows, cols;
  std::vector<double> coefs;
};

// pixels: [3][height][width]. weights: of R, G and B in the component, which is averaged over cells of v x h pixels.
Component naive_component(const std::vector<int>& pixels, int64_t height, int64_t width, int64_t v, int64_t h,
                          const double (&weights)[3], double shift) {
  Component result{up(up(height, v), 8), up(up(width, h), 8), {}};
  std::vector<double> block(64);
  for (int64_t k = 0; k < result.rows * result.cols; ++k) {
    for (int64_t f = 0; f < 64; ++f) {
      block[f] = shift;
      for (int64_t cell = 0; cell < v * h; ++cell) {
        const int64_t y = std::min((k / result.cols * 8 + f / 8) * v + cell / h, height - 1);
        const int64_t x = std::min((k % result.cols * 8 + f % 8) * h + cell % h, width - 1);
        for (int c = 0; c < 3; ++c) block[f] += weights[c] * pixels[(c * height + y) * width + x] / static_cast<double>(v * h);
      }
    }
    naive_2d(8, block, false);
    result.coefs.insert(result.coefs.end(), block.begin(), block.end());
  }
  return result;
}

// Y, Cb and Cr as JFIF defines them.
std::vector<Component> naive_components(const std::vector<int>& pixels, int64_t height, int64_t width, int64_t v, int64_t h) {
  const double red = 0.299, green = 0.587, blue = 0.114;
  const double cb = 2 * (1 - blue), cr = 2 * (1 - red);
  return {naive_component(pixels, height, width, 1, 1, {red, green, blue}, -128),
          naive_component(pixels, height, width, v, h, {-red / cb, -green / cb, (1 - blue) / cb}, 0),
          naive_component(pixels, height, width, v, h, {(1 - red) / cr, -green / cr, -blue / cr}, 0)};
}

void encode_pixel(rgbdct::Pixel pixel, int value, char* to) {
  if (pixel == rgbdct::kByte) {
    *to = static_cast<char>(value);
  } else {
    encode(static_cast<Element>(pixel - rgbdct::kPixelHalf), value, to);
  }
}

// The image as the case has it in memory; what lies between its rows and channels is no pixel of it.
Memory image_of(const RGBCase& c, const std::vector<int>& pixels, rgbdct::Job& job) {
  const int64_t bytes = c.pixel == rgbdct::kByte ? 1 : kBytes[c.pixel - rgbdct::kPixelHalf];
  job.height = c.height, job.width = c.width;
  job.col = c.interleaved && c.width > 1 ? 3 : 1;  // a single column has no step
  job.row = (c.interleaved ? 3 : 1) * c.width + c.gap;
  job.channel = c.interleaved ? 1 : c.height * job.row + c.gap;
  const int64_t count = 2 * job.channel + (c.height - 1) * job.row + (c.width - 1) * job.col + 1;
  Memory image(count * bytes);
  for (int64_t i = 0; i < count; ++i) encode_pixel(c.pixel, random_below(256), image.begin + i * bytes);
  for (int64_t i = 0; i < 3 * c.height * c.width; ++i) {
    const int64_t channel = i / (c.height * c.width), y = i / c.width % c.height, x = i % c.width;
    encode_pixel(c.pixel, pixels[i], image.begin + (channel * job.channel + y * job.row + x * job.col) * bytes);
  }
  return image;
}

Plane coefs_of(const RGBCase& c, const Component& component, std::vector<int16_t>& slots) {
  Plane p{};
  p.rows = component.rows, p.cols = component.cols, p.form = c.form;
  slots.assign(64, -1);
  p.in_order = c.every == 1;
  for (int k = 0; k < 64; ++k) {
    const int f = p.in_order ? k : 63 - k;  // where some are dropped, the rest come in reverse order
    if (f % c.every == 0) slots[f] = static_cast<int16_t>(p.kept++);
  }
  p.slots = slots.data();
  if (c.form == Form::plane) {
    p.coef_j = 1, p.coef_i = p.cols, p.coef_f = p.rows * p.cols + c.gap;
  } else {
    p.coef_f = 1, p.coef_j = p.kept + c.gap, p.coef_i = p.cols * p.coef_j + c.gap;
  }
  return p;
}

// Cuts the image as rgb_cpu.cpp does, with c.tile for its kTileBlocks.
std::vector<rgbdct::Tile> tiles_of(const RGBCase& c) {
  const int64_t down = up(c.height, 8 * c.v), across = up(c.width, 8 * c.h), blocks_of_row = across * c.v * c.h;
  const bool whole = blocks_of_row <= c.tile;
  const int64_t rows = whole ? c.tile / blocks_of_row : 1, cols = whole ? across : c.tile / (c.v * c.h);
  std::vector<rgbdct::Tile> tiles;
  for (int64_t row = 0; row < down; row += rows) {
    for (int64_t col = 0; col < across; col += cols) {
      tiles.push_back({row, std::min(rows, down - row), col, std::min(cols, across - col)});
    }
  }
  if (c.last_to_first) std::reverse(tiles.begin(), tiles.end());
  return tiles;
}

void test_rgb_case(const rgbdct::Kernels& kernels, const RGBCase& c, const std::vector<int>& pixels,
                   const std::vector<Component>& components, const char* tier) {
  rgbdct::Job job{};
  const Memory image = image_of(c, pixels, job);
  std::vector<int16_t> slots;
  job.v = c.v, job.h = c.h;
  job.luma = coefs_of(c, components[0], slots), job.chroma = coefs_of(c, components[1], slots);
  job.luma.slots = job.chroma.slots = slots.data();
  job.emit = kernels.emit[c.element];

  const Element work = c.element == kDouble ? kDouble : kFloat;
  std::vector<Buffer> scales, results;
  for (int k = 0; k < 3; ++k) {
    const Plane& p = k ? job.chroma : job.luma;
    results.emplace_back(c.element, (p.kept - 1) * p.coef_f + (p.rows - 1) * p.coef_i + (p.cols - 1) * p.coef_j + 1);
    scales.emplace_back(work, 64);
    for (int f = 0; f < 64; ++f) encode(work, c.scaled ? (f % 5 + k + 1) / 2.0 : 1, scales[k].at(f));
    job.scale[k] = c.scaled ? scales[k].at(0) : nullptr;
  }
  const std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, kernels.scratch_bytes[c.pixel]), &std::free);
  for (const rgbdct::Tile& tile : tiles_of(c)) {
    kernels.transform[c.pixel](job, tile, image.begin, results[0].at(0), results[1].at(0), results[2].at(0), scratch.get());
  }

  for (int k = 0; k < 3; ++k) {
    const Plane& p = k ? job.chroma : job.luma;
    Expected expected;
    expected.largest = 255 * (c.scaled ? (5 + k) / 2.0 : 1);
    for (int64_t block = 0; block < p.rows * p.cols; ++block) {
      for (int f = 0; f < 64; ++f) {
        if (slots[f] < 0) continue;
        expected.place.push_back(block / p.cols * p.coef_i + block % p.cols * p.coef_j + slots[f] * p.coef_f);
        expected.value.push_back(components[k].coefs[block * 64 + f] * scales[k].get(f));
      }
    }
    char what[200];
    std::snprintf(what, sizeof what,
                  "%s rgb_to_dct %s of %s to %s %dx%d %s cells %dx%d form %d every %d scaled %d gap %d tiles of %d%s", tier,
                  k == 0   ? "Y"
                  : k == 1 ? "Cb"
                           : "Cr",
                  kPixelName[c.pixel], kElementName[c.element], static_cast<int>(c.height), static_cast<int>(c.width),
                  c.interleaved ? "interleaved" : "planar", static_cast<int>(c.v), static_cast<int>(c.h),
                  static_cast<int>(c.form), c.every, c.scaled, static_cast<int>(c.gap), static_cast<int>(c.tile),
                  c.last_to_first ? " last to first" : "");
    compare(what, results[k], expected);
  }
}

void test_rgb(const rgbdct::Kernels& kernels, const char* tier) {
  // Single pixels, parts of MCUs and of vectors, whole ones; then rows that exceed a tile and tiles that are full.
  const int64_t sizes[][2] = {{1, 1},  {1, 3},   {33, 1},   {8, 8},    {7, 9},    {16, 16},  {17, 23},  {9, 31},
                              {5, 67}, {16, 64}, {40, 133}, {98, 197}, {34, 512}, {9, 2100}, {17, 1050}};
  const int64_t cells[][2] = {{1, 1}, {1, 2}, {2, 2}};
  int turn = 0;  // so that the results' types meet everything else
  for (const auto& [height, width] : sizes) {
    for (const auto& [v, h] : cells) {
      std::vector<int> pixels(3 * height * width);
      for (int& pixel : pixels) pixel = random_below(256);
      const std::vector<Component> components = naive_components(pixels, height, width, v, h);
      const bool large = height * width > 64 * 128;
      for (int p = 0; p < rgbdct::kPixels; ++p) {
        for (int variant = 0; variant < 16; ++variant) {
          ++turn;
          if (large && variant != turn / 16 % 16) continue;
          RGBCase c{};
          c.height = height, c.width = width, c.v = v, c.h = h;
          c.pixel = static_cast<rgbdct::Pixel>(p);
          c.element = c.pixel == rgbdct::kPixelDouble ? kDouble : static_cast<Element>(turn % 3);
          c.interleaved = variant & 1;
          c.form = variant & 2 ? Form::block : Form::plane;
          c.every = variant & 4 ? (turn % 2 ? 3 : 20) : 1;
          c.scaled = variant & 8;
          c.gap = random_below(2) * 2;
          c.tile = large ? rgbdct::kTileBlocks : 4 + random_below(40);
          c.last_to_first = random_below(2);
          test_rgb_case(kernels, c, pixels, components, tier);
        }
      }
    }
  }
}

}  // namespace
