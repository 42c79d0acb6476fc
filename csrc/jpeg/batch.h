// Many files at once: read and decoded in threads of the call's own, into memory allocated once.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "jpeg/reader.h"

namespace fourfold::jpeg {

struct Image {
  // Given: bytes, or the path of a file.
  const uint8_t* data = nullptr;
  size_t size = 0;
  const char* path = nullptr;

  // Found.
  Header header{};
  Facts facts{};
  int16_t* coefs = nullptr;
  int32_t* qtables = nullptr;
  std::string problem;   // what is wrong with the file, empty if nothing is
  int system_error = 0;  // errno, of a file that cannot be read
  bool no_memory = false;

  bool failed() const { return !problem.empty() || system_error != 0 || no_memory; }
};

// Reads all images. Returns the memory that their coefficients and tables lie in, for free(); nullptr where there was none to
// be had or none is needed. With stop, images behind one that failed may be left out, and the first that fails is the same for
// any number of threads.
void* read_all(std::vector<Image>& images, const Limits& limits, int64_t threads, bool stop);

}  // namespace fourfold::jpeg
