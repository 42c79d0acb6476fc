#include "jpeg/batch.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>

namespace fourfold::jpeg {
namespace {

// work(i) for all i < n, on this thread and threads - 1 new ones, none of which outlives the call: a process may fork at any
// other time.
template <typename Work>
void for_all(size_t n, int64_t threads, const Work& work) {
  std::atomic<size_t> next{0};
  const auto run = [&] {
    std::vector<int16_t> scratch;
    for (size_t i = next++; i < n; i = next++) work(i, scratch);
  };
  std::vector<std::thread> others;
  const size_t wanted = threads < static_cast<int64_t>(n) ? threads : n;
  try {
    others.reserve(wanted);
    for (size_t t = 1; t < wanted; ++t) others.emplace_back(run);
  } catch (const std::exception&) {
    // No more threads, or memory for them, to be had: those there are do the work.
  }
  run();
  for (std::thread& thread : others) thread.join();
}

// A file's content. Anything but a JPEG is noticed by its first bytes, so that /dev/zero is not read for ever.
void read_file(Image& image, const Limits& limits, std::unique_ptr<uint8_t[]>& content) {
  const int file = open(image.path, O_RDONLY | O_CLOEXEC);
  if (file < 0) {
    image.system_error = errno;
    return;
  }
  struct stat status;
  const bool regular = fstat(file, &status) == 0 && S_ISREG(status.st_mode);
  // Enough to find the frame header behind whatever an editor put before it; the header then says how much more is sensible:
  // the longest codes of a block have fewer than four bytes for each coefficient.
  size_t most = size_t{64} << 20;
  bool has_header = false;
  const size_t expected = regular ? static_cast<size_t>(status.st_size) : 0;
  size_t size = 0, capacity = 0;
  for (;;) {
    if (size > most && !has_header) {
      has_header = true;
      image.problem = read_header(content.get(), size, limits.max_pixels, /*strict=*/false, image.header);
      if (!image.problem.empty()) {
        image.problem = "in its first " + std::to_string(most) + " bytes: " + image.problem;
        break;
      }
      most += 4 * 64 * image.header.blocks();
    }
    if (size > most) {
      image.problem = "more than " + std::to_string(most) + " bytes, which is more than its image can need";
      break;
    }
    if (size == capacity) {
      // One byte more than expected, so that the end of the file shows without another round.
      const size_t wanted = size == 0 ? std::min<size_t>(std::max<size_t>(expected + 1, 4096), 65536)
                                      : std::min(std::max(2 * size, expected + 1), most + 1);
      std::unique_ptr<uint8_t[]> larger(new (std::nothrow) uint8_t[wanted]);
      if (!larger) {
        image.no_memory = true;
        break;
      }
      if (size != 0) std::memcpy(larger.get(), content.get(), size);
      content = std::move(larger);
      capacity = wanted;
    }
    const ssize_t got = ::read(file, content.get() + size, capacity - size);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) image.system_error = errno;
    if (got <= 0) break;
    size += got;
    if (size >= 2 && (content[0] != 0xff || content[1] != 0xd8)) break;
  }
  close(file);
  image.data = content.get();
  image.size = size;
}

// Of an image's tables and coefficients: a multiple of 128, as a block is.
size_t bytes_of(const Header& header) { return header.count * 64 * sizeof(int32_t) + header.blocks() * 64 * sizeof(int16_t); }

}  // namespace

void* read_all(std::vector<Image>& images, const Limits& limits, int64_t threads, bool stop) {
  std::atomic<size_t> first_failed{images.size()};
  const auto guarded = [&](size_t i, const auto& work) {
    if (images[i].failed() || (stop && i > first_failed)) return;
    try {
      work(images[i]);
    } catch (const std::bad_alloc&) {
      images[i].no_memory = true;
    }
    if (!images[i].failed()) return;
    for (size_t before = first_failed; i < before && !first_failed.compare_exchange_weak(before, i);) {
    }
  };

  // Headers first: they say how much memory all of it needs.
  std::vector<std::unique_ptr<uint8_t[]>> contents;
  bool paths = false;
  for (const Image& image : images) paths = paths || image.path != nullptr;
  if (paths) contents.resize(images.size());
  for_all(images.size(), paths ? threads : 1, [&](size_t i, std::vector<int16_t>&) {
    guarded(i, [&](Image& image) {
      if (image.path != nullptr) read_file(image, limits, contents[i]);
      if (!image.failed()) image.problem = read_header(image.data, image.size, limits.max_pixels, limits.strict, image.header);
    });
  });

  const size_t end = stop ? first_failed.load() : images.size();
  size_t bytes = 0;
  for (size_t i = 0; i < end; ++i) bytes += images[i].failed() ? 0 : bytes_of(images[i].header);
  if (bytes == 0) return nullptr;
  // glibc's malloc keeps up to 32 MiB for the next batch; more is fresh from the system each time, and its page faults would
  // cost a tenth of the decoding.
  constexpr size_t kHuge = size_t{1} << 21, kKept = size_t{1} << 25;
  const size_t alignment = bytes >= kKept ? kHuge : 64;
  void* memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (memory == nullptr) {
    for (Image& image : images) image.no_memory = !image.failed();
    return nullptr;
  }
  if (alignment == kHuge) madvise(memory, bytes, MADV_HUGEPAGE);
  auto at = static_cast<char*>(memory);
  for (size_t i = 0; i < end; ++i) {
    if (images[i].failed()) continue;
    images[i].qtables = reinterpret_cast<int32_t*>(at);
    images[i].coefs = reinterpret_cast<int16_t*>(at) + images[i].header.count * 128;
    at += bytes_of(images[i].header);
  }

  for_all(end, threads, [&](size_t i, std::vector<int16_t>& scratch) {
    guarded(i, [&](Image& image) {
      image.problem =
          read_coefficients(image.data, image.size, image.header, limits, image.coefs, image.qtables, image.facts, scratch);
    });
  });
  return memory;
}

}  // namespace fourfold::jpeg
