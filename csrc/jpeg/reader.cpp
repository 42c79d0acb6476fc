#include "jpeg/reader.h"

#include <cstring>

#include "jpeg/libjpeg.h"

namespace fourfold::jpeg {
namespace {

// libjpeg decodes into "virtual arrays" of its memory manager. Ours stand in for them: rows of blocks lie in the caller's
// memory from the start, which saves an allocation as large as the result, its page faults and the copy. Two kinds of row don't
// fit there and go through scratch rows: those that an interleaved scan fills up to whole MCUs, and those below the last real
// one.
struct Plane {
  JBLOCKROW coefs;
  JDIMENSION rows, cols, padded_cols;
  JDIMENSION fresh;        // rows from here on hold nothing yet, not even zeros
  JBLOCKROW scratch;       // rows of padded_cols blocks, as many as one MCU has
  JDIMENSION start, held;  // rows [start, start + held) are in scratch now
  JBLOCKROW row[4];        // what libjpeg is given: one pointer per row of the MCU
};

struct Session {
  jpeg_decompress_struct info;
  Errors errors;
  jpeg_source_mgr source;
  jpeg_progress_mgr progress;
  const uint8_t* data;
  size_t size;
  const Header* header;
  const Limits* limits;
  Plane planes[kMaxComponents];
  int requested;      // planes that libjpeg has asked for
  bool ended;         // the data ended without an end marker
  bool absent[2][2];  // Huffman tables 0 and 1, DC and AC, that the file has not defined before its first scan
};

constexpr int kSalvage = 2;  // the jump that keeps what has been read
constexpr char kLenient[] = "; strict=False reads what is there";

Session& session_of(j_common_ptr info) { return *static_cast<Session*>(info->client_data); }

// ---- the coefficients' memory ----

void zero(JBLOCKROW blocks, size_t n) { std::memset(blocks, 0, n * sizeof(JBLOCK)); }

void flush(Plane& p) {
  for (JDIMENSION i = 0; i < p.held; ++i) {
    std::memcpy(p.coefs + size_t{p.start + i} * p.cols, p.scratch + size_t{i} * p.padded_cols, p.cols * sizeof(JBLOCK));
  }
  p.held = 0;
}

jvirt_barray_ptr request_plane(j_common_ptr info, int, boolean, JDIMENSION cols, JDIMENSION, JDIMENSION) {
  Session& s = session_of(info);
  if (s.requested == s.header->count) fail(info, "libjpeg asks for more planes than there are components");
  Plane& p = s.planes[s.requested++];
  if (cols != p.padded_cols) fail(info, "libjpeg and the frame header disagree about the block grid");
  return reinterpret_cast<jvirt_barray_ptr>(&p);
}

JBLOCKARRAY access_plane(j_common_ptr info, jvirt_barray_ptr array, JDIMENSION start, JDIMENSION rows, boolean) {
  Session& s = session_of(info);
  Plane& p = *reinterpret_cast<Plane*>(array);
  if (rows > 4) fail(info, "libjpeg asks for %u rows at once", rows);
  flush(p);
  const bool interleaved = s.info.comps_in_scan > 1;
  p.start = start;
  for (JDIMENSION i = 0; i < rows; ++i) {
    const JDIMENSION r = start + i;
    JBLOCKROW in_place = p.coefs + size_t{r} * p.cols, in_scratch = p.scratch + size_t{i} * p.padded_cols;
    if (r >= p.rows) {
      if (interleaved) zero(in_scratch, p.padded_cols);
      p.row[i] = interleaved ? in_scratch : nullptr;
      continue;
    }
    const bool fresh = r >= p.fresh;
    if (fresh) {
      // Zeroed only here, just before it is decoded into: the memory is then in the cache, and none is touched for a file that
      // ends early.
      if (r > p.fresh) zero(p.coefs + size_t{p.fresh} * p.cols, size_t{r - p.fresh} * p.cols);
      p.fresh = r + 1;
    }
    if (interleaved && p.padded_cols != p.cols) {
      if (fresh) {
        zero(in_scratch, p.padded_cols);
      } else {
        std::memcpy(in_scratch, in_place, p.cols * sizeof(JBLOCK));
        zero(in_scratch + p.cols, p.padded_cols - p.cols);
      }
      p.row[i] = in_scratch;
      p.held = i + 1;
    } else {
      if (fresh) zero(in_place, p.cols);
      p.row[i] = in_place;
    }
  }
  return p.row;
}

// ---- the file's bytes ----

// The file ends without an end marker. That is no harm where a marker could stand; anywhere else something is missing.
void end_of_data(j_decompress_ptr d) {
  const auto info = reinterpret_cast<j_common_ptr>(d);
  Session& s = session_of(info);
  if (s.ended) return;
  s.ended = true;
  ++s.errors.manager.num_warnings;
  const End end = end_of(s.data, s.size);
  if (end == End::before_image) fail(info, "it ends before its image data");
  if (end == End::in_segment) {
    // libjpeg would take the bytes of end markers for the segment's content.
    const bool any = s.requested == s.header->count;
    if (!s.limits->strict && any) longjmp(s.errors.back, kSalvage);
    fail(info, "it ends inside a marker's segment%s", any ? kLenient : "");
  }
  if (end == End::in_data && s.header->arithmetic && s.limits->strict) {
    // An arithmetic decoder may always read on, in zeros: it can't tell a truncated file from a complete one.
    fail(info, "it ends without an end marker, and arithmetic-coded data does not show whether more is missing%s", kLenient);
  }
}

boolean fill(j_decompress_ptr d) {
  static const JOCTET end_marker[2] = {0xff, JPEG_EOI};
  end_of_data(d);
  d->src->next_input_byte = end_marker;
  d->src->bytes_in_buffer = 2;
  return TRUE;
}

void skip(j_decompress_ptr d, long bytes) {
  if (bytes <= 0) return;
  if (static_cast<size_t>(bytes) > d->src->bytes_in_buffer) {
    fill(d);
    return;
  }
  d->src->next_input_byte += bytes;
  d->src->bytes_in_buffer -= bytes;
}

// ---- what libjpeg reports ----

void on_message(j_common_ptr info, int level) {
  if (level >= 0) return;  // trace
  Session& s = session_of(info);
  ++info->err->num_warnings;
  if (!s.limits->strict) return;
  if (s.ended) fail(info, "it is truncated, in scan %d%s", s.info.input_scan_number, kLenient);
  char message[JMSG_LENGTH_MAX];
  (*info->err->format_message)(info, message);
  fail(info, "%s%s", message, kLenient);
}

// As many scans may a frame of max_pixels have; a smaller one may have more. libjpeg's progressive files have 10, of CMYK 18.
constexpr int64_t kScansOfLargest = 20;

void on_progress(j_common_ptr info) {
  Session& s = session_of(info);
  if (s.info.input_scan_number > s.limits->max_scans) {
    fail(info, "more than max_scans=%lld scans; raise it if you trust the file", static_cast<long long>(s.limits->max_scans));
  }
  // Each scan walks over the whole frame, whatever it holds.
  const int64_t pixels = s.header->height * s.header->width;
  if (s.info.input_scan_number * pixels > kScansOfLargest * s.limits->max_pixels) {
    fail(info, "%d scans of %lld x %lld pixels are more work than max_pixels=%lld allows; raise it if you trust the file",
         s.info.input_scan_number, static_cast<long long>(s.header->width), static_cast<long long>(s.header->height),
         static_cast<long long>(s.limits->max_pixels));
  }
  // The tables that libjpeg has put in place of absent ones serve no scan of a strict reading: see check_tables.
  for (int i = 0; i < 2; ++i) {
    if (s.absent[0][i]) s.info.dc_huff_tbl_ptrs[i] = nullptr;
    if (s.absent[1][i]) s.info.ac_huff_tbl_ptrs[i] = nullptr;
    s.absent[0][i] = s.absent[1][i] = false;
  }
}

// Where a sequential file defines no Huffman table libjpeg-turbo takes the standard's example, as a frame of Motion JPEG wants,
// without a word.
void check_tables(Session& s) {
  if (s.info.progressive_mode || s.info.arith_code) return;
  const auto info = reinterpret_cast<j_common_ptr>(&s.info);
  for (int i = 0; i < s.info.comps_in_scan; ++i) {
    const int dc = s.info.cur_comp_info[i]->dc_tbl_no, ac = s.info.cur_comp_info[i]->ac_tbl_no;
    const bool no_dc = dc >= 0 && dc < 2 && s.info.dc_huff_tbl_ptrs[dc] == nullptr;
    if (!no_dc && !(ac >= 0 && ac < 2 && s.info.ac_huff_tbl_ptrs[ac] == nullptr)) continue;
    if (s.limits->strict) {
      fail(info, "%s Huffman table %d is missing; strict=False reads a Motion-JPEG frame, which means the standard's tables",
           no_dc ? "DC" : "AC", no_dc ? dc : ac);
    }
    ++s.errors.manager.num_warnings;
    return;
  }
  for (int i = 0; i < 2 && s.limits->strict; ++i) {
    s.absent[0][i] = s.info.dc_huff_tbl_ptrs[i] == nullptr;
    s.absent[1][i] = s.info.ac_huff_tbl_ptrs[i] == nullptr;
  }
}

// The memory was laid out by our own reading of the frame header; libjpeg must have read the same.
void check_header(Session& s) {
  const Header& h = *s.header;
  bool same = s.info.image_width == h.width && s.info.image_height == h.height && s.info.num_components == h.count &&
              (s.info.progressive_mode != 0) == h.progressive && (s.info.arith_code != 0) == h.arithmetic;
  for (int c = 0; same && c < h.count; ++c) {
    const jpeg_component_info& component = s.info.comp_info[c];
    same = component.h_samp_factor == h.components[c].h && component.v_samp_factor == h.components[c].v &&
           component.width_in_blocks == h.components[c].cols && component.height_in_blocks == h.components[c].rows;
  }
  if (!same || s.info.data_precision != 8) {
    fail(reinterpret_cast<j_common_ptr>(&s.info), "libjpeg reads another frame header; did the bytes change meanwhile?");
  }
}

// ---- one file ----

// No object with a destructor may live here.
bool decode(Session& s) {
  const int jumped = setjmp(s.errors.back);
  if (jumped != 0) return jumped == kSalvage;
  jpeg_create_decompress(&s.info);
  s.info.mem->request_virt_barray = request_plane;
  s.info.mem->access_virt_barray = access_plane;
  s.info.src = &s.source;
  s.info.progress = &s.progress;
  jpeg_read_header(&s.info, TRUE);
  check_header(s);
  check_tables(s);
  jpeg_read_coefficients(&s.info);
  return true;
}

// What is still missing after the last scan: a problem in a strict reading, else zeros and a warning for each component.
std::string complete(Session& s, int32_t* qtables, Facts& facts) {
  const bool strict = s.limits->strict;
  bool whole = true;
  facts.warnings = 0;
  for (int c = 0; c < s.header->count; ++c) {
    Plane& p = s.planes[c];
    const int* bits = s.info.progressive_mode && s.info.coef_bits != nullptr ? s.info.coef_bits[c] : nullptr;
    flush(p);
    if (p.fresh == 0 || (bits != nullptr && bits[0] < 0)) {
      if (strict) return "no scan holds component " + std::to_string(c) + kLenient;
      ++facts.warnings;
    }
    for (int k = 0; bits != nullptr && k < 64; ++k) whole = whole && bits[k] == 0;
    zero(p.coefs + size_t{p.fresh} * p.cols, size_t{p.rows - p.fresh} * p.cols);
    const jpeg_component_info& component = s.info.comp_info[c];
    const int slot = component.quant_tbl_no;
    const JQUANT_TBL* table = component.quant_table;
    if (table == nullptr && slot >= 0 && slot < NUM_QUANT_TBLS) table = s.info.quant_tbl_ptrs[slot];
    if (table == nullptr) return "quantisation table " + std::to_string(slot) + " is missing";
    bool has_zero = false;
    for (int k = 0; k < 64; ++k) {
      qtables[c * 64 + k] = table->quantval[k];
      has_zero = has_zero || table->quantval[k] == 0;
    }
    if (has_zero) {
      if (strict) return "quantisation table " + std::to_string(slot) + " has a step of 0" + kLenient;
      ++facts.warnings;
    }
  }
  // The format lets a progressive file leave precision out, but then it has an end marker.
  if (s.ended && !whole) {
    if (strict)
      return "it ends after scan " + std::to_string(s.info.input_scan_number) + " of a progressive image, before its last" +
             kLenient;
    ++facts.warnings;
  }
  facts.warnings += s.errors.manager.num_warnings;
  switch (s.info.jpeg_color_space) {
    case JCS_GRAYSCALE:
      facts.color_space = ColorSpace::gray;
      break;
    case JCS_RGB:
      facts.color_space = ColorSpace::rgb;
      break;
    case JCS_CMYK:
      facts.color_space = ColorSpace::cmyk;
      break;
    case JCS_YCCK:
      facts.color_space = ColorSpace::ycck;
      break;
    default:
      facts.color_space = ColorSpace::ycbcr;
  }
  return {};
}

}  // namespace

std::string read_coefficients(const uint8_t* data, size_t size, const Header& header, const Limits& limits, int16_t* coefs,
                              int32_t* qtables, Facts& facts, std::vector<int16_t>& scratch) {
  static_assert(sizeof(JCOEF) == sizeof(int16_t), "libjpeg was built with other coefficients");
  Session s{};
  s.data = data;
  s.size = size;
  s.header = &header;
  s.limits = &limits;
  s.info.client_data = &s;
  s.info.err = &s.errors.manager;
  set_up(s.errors, on_message);
  s.source.next_input_byte = data;
  s.source.bytes_in_buffer = size;
  s.source.init_source = [](j_decompress_ptr) {};
  s.source.fill_input_buffer = fill;
  s.source.skip_input_data = skip;
  s.source.resync_to_restart = jpeg_resync_to_restart;
  s.source.term_source = [](j_decompress_ptr) {};
  s.progress.progress_monitor = on_progress;
  size_t needed = 0, offsets[kMaxComponents];
  auto blocks = reinterpret_cast<JBLOCKROW>(coefs);
  for (int c = 0; c < header.count; ++c) {
    const Component& component = header.components[c];
    Plane& p = s.planes[c];
    p.rows = component.rows;
    p.cols = component.cols;
    p.padded_cols = (component.cols + component.h - 1) / component.h * component.h;
    p.coefs = blocks;
    blocks += component.rows * component.cols;
    offsets[c] = needed;
    if (p.padded_cols != p.cols || component.rows % component.v != 0) needed += size_t{p.padded_cols} * component.v * 64;
  }
  if (scratch.size() < needed) scratch.resize(needed);
  for (int c = 0; c < header.count; ++c) s.planes[c].scratch = reinterpret_cast<JBLOCKROW>(scratch.data() + offsets[c]);
  std::string problem = decode(s) ? complete(s, qtables, facts) : std::string(s.errors.text);
  jpeg_destroy_decompress(&s.info);
  return problem;
}

}  // namespace fourfold::jpeg
