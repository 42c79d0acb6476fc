// fourfold._C: facts of this build and this processor. No torch header, no tensor: ops live in fourfold_ops.
#include <pybind11/pybind11.h>

#include <string>

#include "common/isa.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = FOURFOLD_COMPILER;
  info["torch"] = FOURFOLD_TORCH_VERSION;
  py::list tiers;
#if defined(__x86_64__)
  for (const char* tier : {"baseline", "avx2", "avx512", "avx512_bf16"}) tiers.append(tier);
#elif defined(__aarch64__)
  tiers.append("neon");
#else
  tiers.append("baseline");
#endif
  info["isa_tiers"] = tiers;
  info["cuda_archs"] = py::str(FOURFOLD_CUDA_ARCHS).attr("split")(",");
  if (std::string(FOURFOLD_CUDA_ARCHS).empty()) info["cuda_archs"] = py::list();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Facts of this build of fourfold and of this processor.";
  m.def("build_info", &build_info);
  m.def("cpu_capability", [] { return fourfold::name_of(fourfold::cpu_tier()); });
  m.def("machine_capability", [] { return fourfold::name_of(fourfold::machine_tier()); });
}
