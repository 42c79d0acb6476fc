#include "jpeg/writer.h"

#include <cstdlib>
#include <cstring>

#include "jpeg/libjpeg.h"

namespace fourfold::jpeg {
namespace {

constexpr int kMaxDcDifference = 2047, kMaxAc = 1023;  // of 8-bit samples

// ---- what libjpeg must not be given: its SIMD encoders trust their input ----

template <typename... Args>
std::string text(const char* format, Args... args) {
  char buffer[256];
  std::snprintf(buffer, sizeof buffer, format, args...);
  return buffer;
}

int count_of(ColorSpace space) {
  if (space == ColorSpace::gray) return 1;
  return space == ColorSpace::cmyk || space == ColorSpace::ycck ? 4 : 3;
}

bool interleaves(const Header& h) {
  int blocks = 0;
  for (int c = 0; c < h.count; ++c) blocks += h.components[c].h * h.components[c].v;
  return h.count > 1 && blocks <= kMaxBlocksOfMcu;
}

std::string check_layout(const Picture& picture) {
  const Header& h = picture.header;
  if (h.height < 1 || h.width < 1 || h.height > kMaxDimension || h.width > kMaxDimension) {
    return text("size must be 1 to %d in both directions, got (%lld, %lld)", kMaxDimension, static_cast<long long>(h.height),
                static_cast<long long>(h.width));
  }
  if (h.count != count_of(picture.color_space)) {
    return text("this color_space has %d components, got %d", count_of(picture.color_space), h.count);
  }
  Header expected = h;
  for (int c = 0; c < h.count; ++c) {
    const Component& component = h.components[c];
    if (component.h < 1 || component.h > 4 || component.v < 1 || component.v > 4) {
      return text("sampling factors must be 1 to 4, got (%d, %d) for component %d", component.h, component.v, c);
    }
  }
  expected.lay_out();
  for (int c = 0; c < h.count; ++c) {
    const Component &want = expected.components[c], &got = h.components[c];
    if (want.rows != got.rows || want.cols != got.cols) {
      return text("components[%d] must have %lld x %lld blocks for this size and sampling, got %lld x %lld", c,
                  static_cast<long long>(want.rows), static_cast<long long>(want.cols), static_cast<long long>(got.rows),
                  static_cast<long long>(got.cols));
    }
    for (int k = 0; k < 64; ++k) {
      if (picture.qtables[c][k] < 1 || picture.qtables[c][k] > 65535) {
        return text("quantisation steps must be 1 to 65535, got %d in qtables[%d][%d]", picture.qtables[c][k], c, k);
      }
    }
  }
  return {};
}

std::string check_ac(const int16_t* coefs, int64_t blocks, int64_t cols, int component) {
  for (int64_t b = 0; b < blocks; ++b) {
    const int16_t* block = coefs + b * 64;
    unsigned outside = 0;
    for (int k = 1; k < 64; ++k) outside |= static_cast<uint16_t>(block[k] + kMaxAc) > 2 * kMaxAc;
    if (outside == 0) continue;
    for (int k = 1; k < 64; ++k) {
      if (std::abs(block[k]) <= kMaxAc) continue;
      return text("AC coefficients must be within -%d..%d, got %d at components[%d][%lld, %lld, %d]", kMaxAc, kMaxAc, block[k],
                  component, static_cast<long long>(b / cols), static_cast<long long>(b % cols), k);
    }
  }
  return {};
}

// A DC coefficient is coded as its difference from the one before, in the order of the scan: MCUs of h x v blocks, or plain
// rows.
std::string check_dc(const int16_t* coefs, const Component& component, bool interleaved, bool restarts, int index) {
  const int64_t h = interleaved ? component.h : component.cols, v = interleaved ? component.v : 1;
  int before = 0;
  for (int64_t top = 0; top < component.rows; top += v) {
    for (int64_t left = 0; left < component.cols; left += h) {
      for (int64_t i = top; i < top + v && i < component.rows; ++i) {
        for (int64_t j = left; j < left + h && j < component.cols; ++j) {
          const int dc = coefs[(i * component.cols + j) * 64];
          if (std::abs(dc - before) > kMaxDcDifference || (restarts && std::abs(dc) > kMaxDcDifference)) {
            return text(
                "a DC coefficient may differ by %d from the one coded before it, got %d after %d at components[%d][%lld, "
                "%lld, 0]",
                kMaxDcDifference, dc, before, index, static_cast<long long>(i), static_cast<long long>(j));
          }
          before = dc;
        }
      }
    }
  }
  return {};
}

// ---- libjpeg ----

struct Session {
  jpeg_compress_struct info;
  Errors errors;
  jpeg_destination_mgr destination;
  const Picture* picture;
  const Style* style;
  uint8_t* file;
  size_t size, capacity;
  struct Plane {
    JBLOCKROW coefs;
    JDIMENSION rows, cols;
    JBLOCKROW row[4];
  } planes[kMaxComponents];
  jvirt_barray_ptr arrays[kMaxComponents];
  jpeg_scan_info scans[64];
};

Session& session_of(j_common_ptr info) { return *static_cast<Session*>(info->client_data); }

// libjpeg reads its rows of blocks where the caller has them: what it takes for virtual arrays are our planes. It only reads.
JBLOCKARRAY access_plane(j_common_ptr info, jvirt_barray_ptr array, JDIMENSION start, JDIMENSION rows, boolean) {
  Session::Plane& p = *reinterpret_cast<Session::Plane*>(array);
  if (rows > 4) fail(info, "libjpeg asks for %u rows at once", rows);
  for (JDIMENSION i = 0; i < rows; ++i) {
    p.row[i] = start + i < p.rows ? p.coefs + size_t{start + i} * p.cols : nullptr;  // rows below the last are made up there
  }
  return p.row;
}

void grow(j_compress_ptr c) {
  Session& s = session_of(reinterpret_cast<j_common_ptr>(c));
  const size_t capacity = s.capacity == 0 ? 65536 : 2 * s.capacity;
  auto* larger = static_cast<uint8_t*>(std::realloc(s.file, capacity));
  if (larger == nullptr) fail(reinterpret_cast<j_common_ptr>(c), "no memory for a file of %zu bytes", capacity);
  s.destination.next_output_byte = larger + s.capacity;
  s.destination.free_in_buffer = capacity - s.capacity;
  s.file = larger;
  s.capacity = capacity;
}

// A scan of several components, where their blocks are too many for one MCU, becomes one scan of each.
void separate(Session& s) {
  int n = 0;
  for (int i = 0; i < s.info.num_scans; ++i) {
    for (int c = 0; c < s.info.scan_info[i].comps_in_scan; ++c) {
      if (n == 64) fail(reinterpret_cast<j_common_ptr>(&s.info), "too many scans");
      s.scans[n] = s.info.scan_info[i];
      s.scans[n].comps_in_scan = 1;
      s.scans[n++].component_index[0] = s.info.scan_info[i].component_index[c];
    }
  }
  s.info.scan_info = s.scans;
  s.info.num_scans = n;
}

J_COLOR_SPACE libjpeg_space(ColorSpace space) {
  switch (space) {
    case ColorSpace::gray:
      return JCS_GRAYSCALE;
    case ColorSpace::rgb:
      return JCS_RGB;
    case ColorSpace::cmyk:
      return JCS_CMYK;
    case ColorSpace::ycck:
      return JCS_YCCK;
    default:
      return JCS_YCbCr;
  }
}

// Components with the same table share one.
void set_tables(Session& s) {
  const Picture& picture = *s.picture;
  int tables = 0;
  for (JQUANT_TBL*& table : s.info.quant_tbl_ptrs) table = nullptr;
  for (int c = 0; c < picture.header.count; ++c) {
    int slot = 0, same = -1;
    for (int before = 0; before < c && same < 0; ++before) {
      if (std::memcmp(picture.qtables[before], picture.qtables[c], 64 * sizeof(int32_t)) == 0) same = before;
    }
    if (same >= 0) {
      slot = s.info.comp_info[same].quant_tbl_no;
    } else {
      slot = tables++;
      s.info.quant_tbl_ptrs[slot] = jpeg_alloc_quant_table(reinterpret_cast<j_common_ptr>(&s.info));
      for (int k = 0; k < 64; ++k) s.info.quant_tbl_ptrs[slot]->quantval[k] = picture.qtables[c][k];
    }
    s.info.comp_info[c].quant_tbl_no = slot;
  }
}

// No object with a destructor may live here.
bool encode(Session& s) {
  if (setjmp(s.errors.back) != 0) return false;
  const Header& header = s.picture->header;
  const J_COLOR_SPACE space = libjpeg_space(s.picture->color_space);
  jpeg_create_compress(&s.info);
  s.info.mem->access_virt_barray = access_plane;
  s.info.dest = &s.destination;
  s.info.image_height = header.height;
  s.info.image_width = header.width;
  s.info.input_components = header.count;
  s.info.in_color_space = space;
  jpeg_set_defaults(&s.info);
  jpeg_set_colorspace(&s.info, space);
  s.info.optimize_coding = s.style->optimize && !s.style->arithmetic;
  s.info.arith_code = s.style->arithmetic;
  s.info.restart_interval = s.style->restart_interval;
  set_tables(s);
  for (int c = 0; c < header.count; ++c) {
    s.info.comp_info[c].h_samp_factor = header.components[c].h;
    s.info.comp_info[c].v_samp_factor = header.components[c].v;
  }
  const bool together = header.count == 1 || interleaves(header);
  if (s.style->progressive) {
    jpeg_simple_progression(&s.info);
    if (!together) separate(s);
  } else if (!together) {
    for (int c = 0; c < header.count; ++c) s.scans[c] = {1, {c, 0, 0, 0}, 0, 63, 0, 0};
    s.info.scan_info = s.scans;
    s.info.num_scans = header.count;
  }
  jpeg_write_coefficients(&s.info, s.arrays);
  jpeg_finish_compress(&s.info);
  return true;
}

}  // namespace

std::string write_coefficients(const Picture& picture, const Style& style, uint8_t*& file, size_t& size) {
  file = nullptr;
  size = 0;
  std::string problem = check_layout(picture);
  const Header& header = picture.header;
  for (int c = 0; c < header.count && problem.empty(); ++c) {
    const Component& component = header.components[c];
    problem = check_ac(picture.coefs[c], component.rows * component.cols, component.cols, c);
    if (problem.empty()) problem = check_dc(picture.coefs[c], component, interleaves(header), style.restart_interval != 0, c);
  }
  if (!problem.empty()) return problem;

  Session s{};
  s.picture = &picture;
  s.style = &style;
  s.info.client_data = &s;
  s.info.err = &s.errors.manager;
  set_up(s.errors, [](j_common_ptr, int) {});
  s.destination.init_destination = [](j_compress_ptr c) { grow(c); };
  s.destination.empty_output_buffer = [](j_compress_ptr c) -> boolean {
    grow(c);
    return TRUE;
  };
  s.destination.term_destination = [](j_compress_ptr c) {
    Session& session = session_of(reinterpret_cast<j_common_ptr>(c));
    session.size = session.capacity - session.destination.free_in_buffer;
  };
  for (int c = 0; c < header.count; ++c) {
    s.planes[c].coefs = reinterpret_cast<JBLOCKROW>(const_cast<int16_t*>(picture.coefs[c]));
    s.planes[c].rows = header.components[c].rows;
    s.planes[c].cols = header.components[c].cols;
    s.arrays[c] = reinterpret_cast<jvirt_barray_ptr>(&s.planes[c]);
  }
  if (!encode(s)) problem = s.errors.text;
  jpeg_destroy_compress(&s.info);
  file = s.file;
  size = s.size;
  return problem;
}

}  // namespace fourfold::jpeg
