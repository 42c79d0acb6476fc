// A JPEG file from quantised coefficients, through libjpeg.
#pragma once

#include <cstdint>
#include <string>

#include "jpeg/header.h"
#include "jpeg/reader.h"

namespace fourfold::jpeg {

struct Picture {
  Header header;  // the size and the sampling factors; the grids are the caller's, and checked
  ColorSpace color_space;
  const int16_t* coefs[kMaxComponents];    // [rows, cols, 64]
  const int32_t* qtables[kMaxComponents];  // [64]
};

struct Style {
  bool progressive, optimize;
  // For tests and fuzzing only:
  bool arithmetic;
  int restart_interval;  // MCUs, 0 for none
};

// Allocates the file with malloc; the caller frees it, also after an error. Returns what is wrong, or nothing.
std::string write_coefficients(const Picture& picture, const Style& style, uint8_t*& file, size_t& size);

}  // namespace fourfold::jpeg
