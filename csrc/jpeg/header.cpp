#include "jpeg/header.h"

#include <cstdio>
#include <cstring>

namespace fourfold::jpeg {
namespace {

enum Marker {
  TEM = 0x01,
  SOF0 = 0xc0,
  DHT = 0xc4,
  JPG = 0xc8,
  DAC = 0xcc,
  SOF15 = 0xcf,
  RST0 = 0xd0,
  RST7 = 0xd7,
  SOI = 0xd8,
  EOI = 0xd9,
  SOS = 0xda,
  DHP = 0xde,
  EXP = 0xdf
};

// Steps from marker to marker exactly as libjpeg does, which skips bytes between them (with a warning).
class Markers {
 public:
  Markers(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}

  // The next marker's code, or -1 at the end of the file.
  int next() {
    for (;;) {
      at_ = static_cast<const uint8_t*>(at_ < end_ ? std::memchr(at_, 0xff, end_ - at_) : nullptr);
      if (at_ == nullptr) break;
      while (at_ < end_ && *at_ == 0xff) ++at_;
      if (at_ == end_) break;
      const int code = *at_++;
      if (code != 0) return code;
    }
    at_ = end_;
    return -1;
  }

  static bool has_segment(int code) { return code != TEM && code != SOI && code != EOI && (code < RST0 || code > RST7); }

  // Moves past the segment of the marker just found; its content then lies in content() and length(). False where the file ends
  // first, or the length makes no sense.
  bool take_segment() {
    if (end_ - at_ < 2) return false;
    length_ = at_[0] * 256 + at_[1] - 2;
    content_ = at_ + 2;
    if (length_ < 0 || end_ - content_ < length_) return false;
    at_ = content_ + length_;
    return true;
  }

  const uint8_t* content() const { return content_; }
  int length() const { return length_; }

  // From within compressed data to the marker that ends it: its code, or -1 at the end of the file.
  int skip_data() {
    for (int code = next(); code >= 0; code = next()) {
      if (code < RST0 || code > RST7) return code;
    }
    return -1;
  }

 private:
  const uint8_t* at_;
  const uint8_t* end_;
  const uint8_t* content_ = nullptr;
  int length_ = 0;
};

template <typename... Args>
std::string text(const char* format, Args... args) {
  char buffer[256];
  std::snprintf(buffer, sizeof buffer, format, args...);
  return buffer;
}

// libjpeg decodes SOF0, 1, 2, 9 and 10.
const char* process_of(int code) {
  switch (code - SOF0) {
    case 3:
      return "lossless";
    case 5:
      return "hierarchical (differential sequential)";
    case 6:
      return "hierarchical (differential progressive)";
    case 7:
      return "hierarchical (differential lossless)";
    case 11:
      return "lossless arithmetic";
    case 13:
      return "hierarchical (differential sequential arithmetic)";
    case 14:
      return "hierarchical (differential progressive arithmetic)";
    case 15:
      return "hierarchical (differential lossless arithmetic)";
    default:
      return nullptr;
  }
}

std::string read_frame(int code, const uint8_t* frame, int length, int64_t max_pixels, Header& header) {
  if (const char* process = process_of(code)) {
    return text("SOF%d, a %s JPEG, has no coefficients that can be read; re-encode it as baseline or progressive", code - SOF0,
                process);
  }
  if (length < 6 || length != 6 + 3 * frame[5]) return text("the frame header SOF%d has the wrong length", code - SOF0);
  header.progressive = code == SOF0 + 2 || code == SOF0 + 10;
  header.arithmetic = code == SOF0 + 9 || code == SOF0 + 10;
  header.height = frame[1] * 256 + frame[2];
  header.width = frame[3] * 256 + frame[4];
  header.count = frame[5];
  if (frame[0] != 8) {
    return text("%d-bit samples (SOF%d); only 8-bit JPEGs can be read, re-encode it", frame[0], code - SOF0);
  }
  if (header.width == 0 || header.height == 0) {
    return text("the frame header says %lld x %lld pixels (a height given after the image, by a DNL marker, is not supported)",
                static_cast<long long>(header.width), static_cast<long long>(header.height));
  }
  if (header.width > kMaxDimension || header.height > kMaxDimension) {
    return text("%lld x %lld pixels exceed libjpeg's limit of %d in one direction", static_cast<long long>(header.width),
                static_cast<long long>(header.height), kMaxDimension);
  }
  if (header.width * header.height > max_pixels) {
    return text("%lld x %lld pixels exceed max_pixels=%lld; raise it if you trust the file",
                static_cast<long long>(header.width), static_cast<long long>(header.height),
                static_cast<long long>(max_pixels));
  }
  if (header.count != 1 && header.count != 3 && header.count != 4) {
    return text("%d components; expected 1 (gray), 3 (YCbCr, RGB) or 4 (CMYK, YCCK)", header.count);
  }
  for (int c = 0; c < header.count; ++c) {
    const int factors = frame[6 + 3 * c + 1];
    header.components[c].h = factors >> 4;
    header.components[c].v = factors & 15;
    if (factors >> 4 < 1 || factors >> 4 > 4 || (factors & 15) < 1 || (factors & 15) > 4) {
      return text("component %d has sampling factors (%d, %d); they must be 1 to 4", c, factors >> 4, factors & 15);
    }
  }
  header.lay_out();
  return {};
}

}  // namespace

std::string read_header(const uint8_t* data, size_t size, int64_t max_pixels, bool strict, Header& header) {
  if (size == 0) return "empty";
  if (size < 2 || data[0] != 0xff || data[1] != SOI) {
    std::string start = "not a JPEG, it starts with";
    for (size_t i = 0; i < size && i < 4; ++i) start += text(" %02x", data[i]);
    return start + " instead of ff d8";
  }
  Markers markers(data + 2, size - 2);
  for (int code = markers.next(); code >= 0; code = markers.next()) {
    if (code == SOI) return "two start-of-image markers";
    if (code == EOI) return "it holds tables only, no image";
    if (code == DHP || code == EXP) return "a hierarchical JPEG (DHP or EXP marker) has no coefficients that can be read";
    if (code == SOS) return "a scan starts before any frame header";
    if (!Markers::has_segment(code)) continue;
    if (!markers.take_segment()) {
      return markers.length() < 0 ? text("the segment of marker ff %02x has a length below 2", code)
                                  : text("it ends inside the segment of marker ff %02x, before the frame header", code);
    }
    if (code < SOF0 || code > SOF15 || code == DHT || code == JPG || code == DAC) continue;
    std::string problem = read_frame(code, markers.content(), markers.length(), max_pixels, header);
    if (!problem.empty() || !strict || header.arithmetic) return problem;
    // Huffman codes have at least one bit: two codes per block, or one in the first scan of a progressive file.
    if (header.blocks() > static_cast<int64_t>(size) * (header.progressive ? 8 : 4)) {
      return text(
          "it is truncated: %zu bytes cannot hold the %lld blocks of %lld x %lld pixels; strict=False reads what is there",
          size, static_cast<long long>(header.blocks()), static_cast<long long>(header.width),
          static_cast<long long>(header.height));
    }
    return {};
  }
  return "it ends before the frame header";
}

End end_of(const uint8_t* data, size_t size) {
  Markers markers(data + 2, size - 2);
  bool scans = false;
  int code = markers.next();
  while (code >= 0) {
    if (code == EOI) return End::at_marker;
    if (Markers::has_segment(code) && !markers.take_segment()) return End::in_segment;
    scans = scans || code == SOS;
    if (code == SOS) {
      code = markers.skip_data();
      if (code < 0) return End::in_data;
    } else {
      code = markers.next();
    }
  }
  return scans ? End::at_marker : End::before_image;
}

}  // namespace fourfold::jpeg
