// Table of contents of the native side: the schema of every op, and the module that Python imports to register them.
#include <Python.h>

#include "torch_glue.h"

STABLE_TORCH_LIBRARY(pymend, m) {
  // weights[i] -= alpha[i] * sum_r delta[i][r] u[i][r]^T, in place; returns the fidelity per matrix, dtype of alpha.
  //   weights: [out, in], or [in, out] where transposed; all of one dtype; contiguous, not overlapping
  //   u: [n, in], delta: [n, out], alpha: [len(weights)]; float32, float64 for float64 weights; contiguous
  m.def("rank_update(Tensor(a!)[] weights, Tensor[] u, Tensor[] delta, Tensor alpha, bool[] transposed) -> Tensor");
}

namespace {

int fill_module(PyObject* module) { return PyModule_AddStringConstant(module, "build_info", PYMEND_BUILD_INFO); }

PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(fill_module)}, {0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, slots, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&definition); }
