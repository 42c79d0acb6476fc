// Fuzzes the reader and the writer of JPEG coefficients. Whatever the bytes are, the reader must return; what it returns from
// them must survive writing and reading again; and whatever coefficients the writer is given, it must refuse them or write a
// file that reads back as they were.
//
// With g++ alone, for a minute:
//   g++ -std=c++17 -g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc
//     csrc/jpeg/fuzz.cpp csrc/jpeg/header.cpp csrc/jpeg/reader.cpp csrc/jpeg/writer.cpp -ljpeg -o build/jpeg_fuzz
//   build/jpeg_fuzz 60
// For hours: build/jpeg_fuzz 36000 $RANDOM (seconds, seed), one per core with seeds of their own. What makes it fail is left
// in jpeg_fuzz_failure.bin; build/jpeg_fuzz FILE runs that again.
// With clang's libFuzzer, which follows the code's branches: the same line with clang++, -DFOURFOLD_LIBFUZZER and
// -fsanitize=fuzzer,address,undefined; then build/jpeg_fuzz -max_len=4096 CORPUS_FOLDER.
// Sanitizers see libjpeg itself only where it is built with them: add -L and -Wl,-rpath of such a build.
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "jpeg/reader.h"
#include "jpeg/writer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

namespace fourfold::jpeg {
namespace {

constexpr int64_t kMaxPixels = 1 << 16;
constexpr int64_t kMaxScans = 40;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "jpeg_fuzz: %s\n", what);
  std::abort();
}

// Coefficients and tables in memory of exactly their size, so that a write beyond them is seen.
struct Decoded {
  Header header{};
  Facts facts{};
  std::unique_ptr<int16_t[]> coefs;
  std::unique_ptr<int32_t[]> qtables;
};

std::string decode(const uint8_t* data, size_t size, bool strict, Decoded& to) {
  std::string problem = read_header(data, size, kMaxPixels, strict, to.header);
  if (!problem.empty()) return problem;
  to.coefs.reset(new int16_t[to.header.blocks() * 64]);
  to.qtables.reset(new int32_t[to.header.count * 64]);
  std::vector<int16_t> scratch;
  return read_coefficients(data, size, to.header, {strict, kMaxPixels, kMaxScans}, to.coefs.get(), to.qtables.get(), to.facts,
                           scratch);
}

Picture picture_of(const Decoded& decoded) {
  Picture picture{};
  picture.header = decoded.header;
  picture.color_space = decoded.facts.color_space;
  const int16_t* coefs = decoded.coefs.get();
  for (int c = 0; c < decoded.header.count; ++c) {
    picture.coefs[c] = coefs;
    coefs += decoded.header.components[c].rows * decoded.header.components[c].cols * 64;
    picture.qtables[c] = decoded.qtables.get() + c * 64;
  }
  return picture;
}

// Writes the picture; if it was not refused, reads it back, strictly, and compares. Returns the file.
std::vector<uint8_t> write_and_compare(const Decoded& decoded, const Style& style) {
  uint8_t* written = nullptr;
  size_t size = 0;
  const std::string problem = write_coefficients(picture_of(decoded), style, written, size);
  const std::unique_ptr<uint8_t, decltype(&std::free)> file(written, &std::free);
  if (!problem.empty()) return {};
  Decoded again;
  const std::string refused = decode(file.get(), size, true, again);
  require(refused.empty(), ("the reader refuses what the writer has written: " + refused).c_str());
  require(again.facts.warnings == 0, "a written file has warnings");
  require(again.facts.color_space == decoded.facts.color_space, "another color space");
  require(again.header.progressive == style.progressive && again.header.arithmetic == style.arithmetic, "another coding");
  require(again.header.height == decoded.header.height && again.header.width == decoded.header.width, "another size");
  require(again.header.count == decoded.header.count, "another number of components");
  for (int c = 0; c < again.header.count; ++c) {
    require(again.header.components[c].h == decoded.header.components[c].h, "another h");
    require(again.header.components[c].v == decoded.header.components[c].v, "another v");
  }
  require(std::memcmp(again.qtables.get(), decoded.qtables.get(), again.header.count * 64 * sizeof(int32_t)) == 0,
          "other quantisation tables");
  require(std::memcmp(again.coefs.get(), decoded.coefs.get(), again.header.blocks() * 64 * sizeof(int16_t)) == 0,
          "other coefficients");
  return {file.get(), file.get() + size};
}

Style style_of(unsigned choice) {
  return {(choice & 1) != 0, (choice & 2) != 0, (choice & 12) == 12,
          (choice & 48) == 48 ? static_cast<int>(choice >> 6 & 7) : 0};
}

void fuzz_reader(const uint8_t* data, size_t size) {
  Decoded strict, lenient;
  const bool sound = decode(data, size, true, strict).empty();
  const bool readable = decode(data, size, false, lenient).empty();
  require(readable || !sound, "a file can be read strictly, but not leniently");
  if (sound) {
    require(strict.facts.warnings <= 1, "a strict reading passed over more than a missing end marker");
    require(std::memcmp(strict.coefs.get(), lenient.coefs.get(), strict.header.blocks() * 64 * sizeof(int16_t)) == 0,
            "a strict and a lenient reading differ");
  }
  if (readable) write_and_compare(lenient, style_of(size * 7 + (size > 30 ? data[size - 3] : 0)));
}

// A picture made of the bytes: size, sampling and coefficients, most of them small, some that no file can hold.
Decoded made_of(const uint8_t* data, size_t size) {
  Decoded made;
  size_t at = 0;
  const auto next = [&] { return size == 0 ? 0 : data[at++ % size]; };
  constexpr int counts[] = {1, 3, 3, 4, 4};
  const int space = next() % 5;
  made.facts.color_space = static_cast<ColorSpace>(space);
  made.header.count = counts[space];
  made.header.height = next() % 70 + 1;
  made.header.width = next() % 70 + 1;
  for (int c = 0; c < made.header.count; ++c) {
    const int factors = next();
    made.header.components[c].h = (factors & 64 ? factors : 0) % 4 + 1;
    made.header.components[c].v = (factors & 128 ? factors >> 2 : 0) % 4 + 1;
  }
  made.header.lay_out();
  const int range = next();
  made.qtables.reset(new int32_t[made.header.count * 64]);
  for (int k = 0; k < made.header.count * 64; ++k) made.qtables[k] = 1 + next() * (range & 1 ? 257 : 1);
  made.coefs.reset(new int16_t[made.header.blocks() * 64]);
  for (int64_t k = 0; k < made.header.blocks() * 64; ++k) {
    const int value = static_cast<int8_t>(next());
    const int scale = range % 16 == 15 ? 256 : range % 16 > 10 ? 7 : 1;
    made.coefs[k] = static_cast<int16_t>(range % 16 > 8 || value > 64 ? value * scale : 0);
  }
  return made;
}

}  // namespace
}  // namespace fourfold::jpeg

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace fourfold::jpeg;
  // The first byte decides what the rest is.
  if (size > 0 && data[0] != 0xff) {
    write_and_compare(made_of(data + 1, size - 1), style_of(data[0]));
  } else {
    fuzz_reader(data, size);
  }
  return 0;
}

#if !defined(FOURFOLD_LIBFUZZER)

namespace {

using Bytes = std::vector<uint8_t>;

const Bytes* current = nullptr;

void save_failure() {
  if (current == nullptr) return;
  FILE* file = std::fopen("jpeg_fuzz_failure.bin", "wb");
  if (file == nullptr) return;
  std::fwrite(current->data(), 1, current->size(), file);
  std::fclose(file);
  std::fprintf(stderr, "jpeg_fuzz: %zu bytes written to jpeg_fuzz_failure.bin\n", current->size());
}

void on_signal(int) {
  save_failure();
  std::signal(SIGABRT, SIG_DFL);
  std::abort();
}

Bytes random_bytes(std::mt19937_64& random, size_t n) {
  Bytes bytes(n);
  for (uint8_t& b : bytes) b = random();
  return bytes;
}

// Files of every color space, sampling and coding that the writer knows.
std::vector<Bytes> make_corpus(std::mt19937_64& random) {
  using namespace fourfold::jpeg;
  std::vector<Bytes> corpus;
  for (unsigned style = 0; corpus.size() < 120; ++style) {
    const Bytes seed = random_bytes(random, 60 + style % 300);
    Bytes file = write_and_compare(made_of(seed.data(), seed.size()), style_of(style));
    if (!file.empty() && file.size() < 20000) corpus.push_back(std::move(file));
  }
  return corpus;
}

Bytes mutate(std::mt19937_64& random, const std::vector<Bytes>& corpus) {
  Bytes bytes = corpus[random() % corpus.size()];
  for (int edits = 1 << random() % 5; edits > 0 && !bytes.empty(); --edits) {
    const size_t at = random() % bytes.size();
    // Half of all edits go to the first segments, where a file says what it is.
    const size_t where = random() % 2 ? at : at % 700 % bytes.size();
    const size_t length = std::min<size_t>(random() % 64, bytes.size() - where);
    switch (random() % 9) {
      case 0:
        bytes[where] ^= 1 << random() % 8;
        break;
      case 1:
        bytes[where] = random();
        break;
      case 2:
        bytes.resize(at);
        break;
      case 3:
        bytes.erase(bytes.begin() + where, bytes.begin() + where + length);
        break;
      case 4: {
        const Bytes copy(bytes.begin() + where, bytes.begin() + where + length);
        bytes.insert(bytes.begin() + at, copy.begin(), copy.end());
        break;
      }
      case 5: {
        const Bytes& other = corpus[random() % corpus.size()];
        const size_t from = random() % other.size();
        bytes.resize(at);
        bytes.insert(bytes.end(), other.begin() + from, other.end());
        break;
      }
      case 6: {
        const uint8_t marker[2] = {0xff, static_cast<uint8_t>(0xc0 + random() % 64)};
        bytes.insert(bytes.begin() + where, marker, marker + 2);
        break;
      }
      case 7:
        // A byte of a frame or scan header, or of a table: a small change, behind a marker.
        for (size_t i = where; i + 20 < bytes.size(); ++i) {
          if (bytes[i] != 0xff || bytes[i + 1] < 0xc0) continue;
          bytes[i + 2 + random() % 18] = random() % 2 ? random() % 5 : random();
          break;
        }
        break;
      default: {
        const Bytes noise = random_bytes(random, length);
        std::copy(noise.begin(), noise.end(), bytes.begin() + where);
      }
    }
  }
  return bytes;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s SECONDS [SEED], or %s FILE\n", argv[0], argv[0]);
    return 2;
  }
  char* rest = nullptr;
  const double seconds = std::strtod(argv[1], &rest);
  if (*rest != 0) {
    FILE* file = std::fopen(argv[1], "rb");
    if (file == nullptr) {
      std::perror(argv[1]);
      return 2;
    }
    Bytes bytes(1 << 20);
    bytes.resize(std::fread(bytes.data(), 1, bytes.size(), file));
    std::fclose(file);
    return LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::mt19937_64 random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(save_failure);
  for (int signal : {SIGABRT, SIGALRM, SIGSEGV}) {
    if (signal != SIGSEGV || __sanitizer_set_death_callback == nullptr) std::signal(signal, on_signal);
  }
  const std::vector<Bytes> corpus = make_corpus(random);
  std::printf("jpeg_fuzz: %zu files to begin with\n", corpus.size());
  const std::time_t start = std::time(nullptr);
  long runs = 0, read = 0;
  for (; std::difftime(std::time(nullptr), start) < seconds; ++runs) {
    Bytes input = random() % 4 == 0 ? random_bytes(random, 1 + random() % 400) : mutate(random, corpus);
    // Exactly as large as its content, so that a read beyond it is seen.
    input.shrink_to_fit();
    current = &input;
    alarm(30);  // nothing here takes a second
    LLVMFuzzerTestOneInput(input.data(), input.size());
    fourfold::jpeg::Decoded decoded;
    read += runs % 16 == 0 && fourfold::jpeg::decode(input.data(), input.size(), false, decoded).empty();
    current = nullptr;
  }
  std::printf("jpeg_fuzz: %ld inputs; of every 16th, %ld could be read\n", runs, read);
  // A fuzzer whose inputs are all refused at once tests nothing.
  return runs > 0 && read == 0;
}

#endif
