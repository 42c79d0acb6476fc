// fourfold._jpeg: JPEG files as numpy arrays. A library of its own, so that importing fourfold doesn't need libjpeg.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "jpeg/batch.h"
#include "jpeg/libjpeg.h"
#include "jpeg/writer.h"

namespace py = pybind11;

namespace {

std::string version() {
#if defined(LIBJPEG_TURBO_VERSION_NUMBER)
  constexpr int number = LIBJPEG_TURBO_VERSION_NUMBER;
  return "libjpeg-turbo " + std::to_string(number / 1000000) + "." + std::to_string(number / 1000 % 1000) + "." +
         std::to_string(number % 1000);
#else
  return "libjpeg " + std::to_string(JPEG_LIB_VERSION);
#endif
}

constexpr const char* kColorSpaces[] = {"gray", "ycbcr", "rgb", "cmyk", "ycck"};

using Pixels = py::array_t<int16_t, py::array::c_style>;
using Table = py::array_t<int32_t, py::array::c_style>;

// A view of memory that its owner frees.
template <typename T>
py::object view(T* data, std::initializer_list<Py_ssize_t> shape, const py::object& owner) {
  return py::array_t<T>(py::array::ShapeContainer(shape), data, owner);
}

// (components, qtables, size, sampling, color_space, progressive, warnings); the problem as a str; errno; or None if there was
// no memory. The texts and the exceptions are made in Python.
py::object result_of(const fourfold::jpeg::Image& image, const py::object& owner) {
  if (image.no_memory) return py::none();
  if (image.system_error != 0) return py::int_(image.system_error);
  if (!image.problem.empty()) return py::str(image.problem);
  const fourfold::jpeg::Header& header = image.header;
  py::tuple components(header.count), qtables(header.count), sampling(header.count);
  int16_t* coefs = image.coefs;
  for (int c = 0; c < header.count; ++c) {
    const fourfold::jpeg::Component& component = header.components[c];
    components[c] = view(coefs, {component.rows, component.cols, 64}, owner);
    coefs += component.rows * component.cols * 64;
    qtables[c] = view(image.qtables + c * 64, {64}, owner);
    sampling[c] = py::make_tuple(component.h, component.v);
  }
  return py::make_tuple(components, qtables, py::make_tuple(header.height, header.width), sampling,
                        kColorSpaces[static_cast<int>(image.facts.color_space)], header.progressive, image.facts.warnings);
}

// Bytes of Python objects, held in place while they are read without the GIL.
class Buffers {
 public:
  Buffers() = default;
  Buffers(const Buffers&) = delete;
  ~Buffers() {
    for (Py_buffer& buffer : held_) PyBuffer_Release(&buffer);
  }

  // A source is a path, as (bytes,), or has a buffer.
  void add(py::handle source, fourfold::jpeg::Image& image) {
    if (PyTuple_CheckExact(source.ptr())) {
      image.path = PyBytes_AsString(PyTuple_GetItem(source.ptr(), 0));
      if (image.path == nullptr) throw py::error_already_set();
      return;
    }
    Py_buffer buffer;
    if (PyObject_GetBuffer(source.ptr(), &buffer, PyBUF_SIMPLE) != 0) throw py::error_already_set();
    held_.push_back(buffer);
    image.data = static_cast<const uint8_t*>(buffer.buf);
    image.size = buffer.len;
  }

 private:
  std::vector<Py_buffer> held_;
};

py::list read_sources(const py::sequence& sources, bool strict, int64_t max_pixels, int64_t max_scans, int64_t threads,
                      bool stop) {
  Buffers buffers;
  std::vector<fourfold::jpeg::Image> images(sources.size());
  for (size_t i = 0; i < images.size(); ++i) buffers.add(sources[i], images[i]);
  void* memory = nullptr;
  {
    py::gil_scoped_release release;
    memory = read_all(images, {strict, max_pixels, max_scans}, threads, stop);
  }
  py::object owner = py::none();
  if (memory != nullptr) owner = py::capsule(memory, [](void* data) { std::free(data); });
  py::list results(images.size());
  size_t i = 0;
  // Behind the first that failed there may be holes.
  for (; i < images.size(); ++i) {
    results[i] = result_of(images[i], owner);
    if (stop && images[i].failed()) break;
  }
  for (++i; i < images.size(); ++i) results[i] = py::none();
  return results;
}

py::object write_picture(const std::vector<Pixels>& components, const std::vector<Table>& qtables,
                         const std::pair<int64_t, int64_t>& size, const std::vector<std::pair<int, int>>& sampling,
                         int color_space, bool progressive, bool optimize, bool arithmetic, int restart_interval) {
  fourfold::jpeg::Picture picture{};
  picture.header.height = size.first;
  picture.header.width = size.second;
  picture.header.count = components.size();
  picture.color_space = static_cast<fourfold::jpeg::ColorSpace>(color_space);
  for (size_t c = 0; c < components.size(); ++c) {
    picture.header.components[c] = {sampling[c].first, sampling[c].second, components[c].shape(0), components[c].shape(1)};
    picture.coefs[c] = components[c].data();
    picture.qtables[c] = qtables[c].data();
  }
  uint8_t* file = nullptr;
  size_t length = 0;
  std::string problem;
  {
    py::gil_scoped_release release;
    problem = write_coefficients(picture, {progressive, optimize, arithmetic, restart_interval}, file, length);
  }
  const std::unique_ptr<uint8_t, decltype(&std::free)> owner(file, &std::free);
  if (!problem.empty()) return py::str(problem);
  return py::bytes(reinterpret_cast<const char*>(file), length);
}

}  // namespace

PYBIND11_MODULE(_jpeg, m, py::mod_gil_not_used()) {
  m.doc() = "JPEG files as numpy arrays.";
  m.def("version", &version);
  m.def("read", &read_sources, py::arg("sources"), py::arg("strict"), py::arg("max_pixels"), py::arg("max_scans"),
        py::arg("threads"), py::arg("stop"));
  m.def("write", &write_picture, py::arg("components"), py::arg("qtables"), py::arg("size"), py::arg("sampling"),
        py::arg("color_space"), py::arg("progressive"), py::arg("optimize"), py::arg("arithmetic") = false,
        py::arg("restart_interval") = 0);
}
