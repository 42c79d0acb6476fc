// Quantised coefficients of a JPEG file, through libjpeg.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "jpeg/header.h"

namespace fourfold::jpeg {

struct Limits {
  bool strict;         // a warning of libjpeg is an error, a missing end marker alone excepted
  int64_t max_pixels;  // of the frame; all scans together may walk over 20 times as many
  int64_t max_scans;
};

enum class ColorSpace { gray, ycbcr, rgb, cmyk, ycck };

struct Facts {
  ColorSpace color_space;
  int64_t warnings;
};

// A block is 64 coefficients in natural order, and so is a table. Writes header.blocks() blocks, component after component, row
// after row, and a table per component. Scratch is memory that the next call may use again. Returns what is wrong, or nothing.
std::string read_coefficients(const uint8_t* data, size_t size, const Header& header, const Limits& limits, int16_t* coefs,
                              int32_t* qtables, Facts& facts, std::vector<int16_t>& scratch);

}  // namespace fourfold::jpeg
