// What a JPEG file says about itself up to its frame header, and where a file that stops short does so. No libjpeg here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fourfold::jpeg {

constexpr int kMaxComponents = 4;
constexpr int kMaxDimension = 65500;  // libjpeg's; the format could say 65535
constexpr int kMaxBlocksOfMcu = 10;

struct Component {
  int h, v;            // sampling factors
  int64_t rows, cols;  // grid of 8x8 blocks, without those that only fill up the last MCU
};

struct Header {
  int64_t height, width;
  int count;
  bool progressive, arithmetic;
  Component components[kMaxComponents];

  int64_t blocks() const {
    int64_t sum = 0;
    for (int c = 0; c < count; ++c) sum += components[c].rows * components[c].cols;
    return sum;
  }

  // Fills in every component's grid from the size and the sampling factors.
  void lay_out() {
    int h_max = 1, v_max = 1;
    for (int c = 0; c < count; ++c) {
      h_max = components[c].h > h_max ? components[c].h : h_max;
      v_max = components[c].v > v_max ? components[c].v : v_max;
    }
    for (int c = 0; c < count; ++c) {
      components[c].rows = (height * components[c].v + 8 * v_max - 1) / (8 * v_max);
      components[c].cols = (width * components[c].h + 8 * h_max - 1) / (8 * h_max);
    }
  }
};

// Reads up to the frame header. Returns what is wrong, or nothing. In a strict reading a file too short for its blocks is wrong
// too, so that a small file never makes its reader allocate much.
std::string read_header(const uint8_t* data, size_t size, int64_t max_pixels, bool strict, Header& header);

enum class End {
  before_image,  // no scan has begun
  in_segment,    // inside the segment that a marker announced
  in_data,       // after compressed data that no marker ends
  at_marker      // where the next marker should be
};

// Where the file ends, if it has no end marker.
End end_of(const uint8_t* data, size_t size);

}  // namespace fourfold::jpeg
