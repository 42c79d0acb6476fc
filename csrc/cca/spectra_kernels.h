// The kernels of spectra as spectra_cpu.cpp sees them. Steps are in elements.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace fourfold::spectra {

// A direction of `size` pixels: the frequencies 0 .. size / 2 have a cosine, 1 .. (size - 1) / 2 also a sine. Pixel j and pixel
// size - j meet the same cosine and opposite sines, so each needs only about half of the pixels, added or subtracted.
struct Direction {
  int64_t size;
  const double* cosines;  // [half, half]: of frequency k at pixel j
  const double* sines;    // [pairs, pairs]: of frequency k + 1 at pixel j + 1

  int64_t half() const { return size / 2 + 1; }
  int64_t pairs() const { return (size - 1) / 2; }
};

// `count` channels of one image, at most as many as kernels().channels; the pivot is [h, w, kernels().channels], aligned.
struct Image {
  const void* data;
  int64_t count;
  int64_t channel_step, row_step, column_step;
  const double* pivot;
};

// Of these channels, in the order of the frequencies: real parts [count], and imaginary parts imaginary_step later.
struct Spectra {
  void* data;
  int64_t frequency_step, imaginary_step;
  bool stream;  // past the caches
};

// Samples of one frequency [2, n, channels], its real and its imaginary parts, each sample's channels contiguous.
struct Samples {
  const void* data;
  int64_t channels;
  int64_t imaginary_step, sample_step;
};

// Samples that are packed at a time.
constexpr int64_t kDepth = 64;

// By type of the spectra: float32, float64.
enum SpectraType { kFloatSpectra, kDoubleSpectra, kSpectraTypes };

struct Kernels {
  int64_t channels;   // that are transformed side by side
  int64_t alignment;  // of scratch memory, in bytes

  // Bytes of scratch memory of a transform.
  int64_t (*transform_scratch)(int64_t h, int64_t w);
  // An image minus the pivot, transformed.
  void (*transform[kElements][kSpectraTypes])(const Direction& along_h, const Direction& along_w, const Image& from,
                                              const Spectra& to, void* scratch);
  // After streaming.
  void (*fence)();

  // Bytes of scratch memory of a gram.
  int64_t (*gram_scratch)(int64_t rows, int64_t columns);
  // total [a.channels, b.channels] += the real plus the imaginary part of conj(a) b^T, summed over at most kDepth samples, in
  // the spectra's type; sums [a.channels, 2], if not null, += those of a's real and imaginary parts.
  void (*gram[kSpectraTypes])(const Samples& a, const Samples& b, int64_t count, double* total, int64_t row_step, double* sums,
                              void* scratch);
};

}  // namespace fourfold::spectra
