// Table of contents of the native side: the schema of every op, and the module that Python imports to register them.
#include <Python.h>

#include "torch_glue.h"

STABLE_TORCH_LIBRARY(pymend, m) {
  // The rows (u, delta) of several weights, segment by segment: merged into the moments (if `merge`), then normalised
  // with them. Returns z [rows, a + b] in `dtype`, rows in the order of the segments, and which rows are live [rows]; a
  // dead row, whose u or delta is zero throughout, gives a zero row.
  //   u: [n_i, a], delta: [n_i, b] of weight i, all of one dtype, float32 or float64; contiguous
  //   counts: [episodes * weights], rows of each segment, episode by episode and within one weight by weight
  //   mean, m2: [a + b] float64, contiguous; count: [] int64; written if `merge`
  m.def(
      "moments(Tensor[] u, Tensor[] delta, int[] counts, Tensor(a!) mean, Tensor(b!) m2, Tensor(c!) count, "
      "bool merge, ScalarType dtype) -> (Tensor, Tensor)");
  // weights[i] -= alpha[i] * sum_r delta[i][r] u[i][r]^T, in place; returns the fidelity per matrix, dtype of alpha.
  //   weights: [out, in], or [in, out] where transposed; all of one dtype; contiguous, not overlapping
  //   u: [n, in], delta: [n, out], alpha: [len(weights)]; float32, float64 for float64 weights; contiguous
  //   seeds: one per weight for random rounding of bfloat16 and float16, or none for rounding to nearest
  m.def(
      "rank_update(Tensor(a!)[] weights, Tensor[] u, Tensor[] delta, Tensor alpha, bool[] transposed, int[] seeds)"
      " -> Tensor");

  // One layer of the editor's network after its products: x + max(scale[mode] * (p + bias) + shift[mode], 0) [R, d].
  //   x, p: [R, d], bias: [d], scale, shift: [modes, d], or neither; float32 or float64, all of one; contiguous
  //   mode: [R] int64, below modes; not read without scale
  m.def("editor_mlp(Tensor? x, Tensor p, Tensor bias, Tensor? scale, Tensor? shift, Tensor mode) -> Tensor");

  // Its backward: gradients of p [R, d], bias [d], scale and shift [modes, d] ([0, d] without them) for that of y.
  m.def("editor_mlp_backward(Tensor grad, Tensor p, Tensor bias, Tensor? scale, Tensor? shift, Tensor mode) "
        "-> (Tensor, Tensor, Tensor, Tensor)");

  // Adam's step number `step` (from 1) on param, in place, for the gradient scale * left^T right, which is not stored; CPU only.
  //   param, exp_avg, exp_avg_sq: [rows, cols]; left: [n, rows], right: [n, cols]; scale: [] (the clip factor)
  //   all float32, contiguous, not overlapping
  m.def(
      "factored_adam(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor left, Tensor right, "
      "Tensor scale, float lr, float beta1, float beta2, float eps, int step) -> ()");

  // Per row of logits: -log softmax(logits)[target], KL(softmax(base) || softmax(logits)), both argmaxes (NaN is largest,
  // the lowest index among equals), and what the backward pass needs: maximum and sum of exponentials of both.
  //   logits, base: [k, V], one dtype, rows contiguous; target: [k] int64, -100 does not count
  //   nll, kl: [k], stats: [k, 4], float32, float64 for float64 logits; best, base_best: [k] int64
  //   nll is [0] without a target, kl and base_best are without a base
  m.def(
      "token_losses(Tensor logits, Tensor? target, Tensor? base) "
      "-> (Tensor nll, Tensor kl, Tensor best, Tensor base_best, Tensor stats)");
  // grad_nll (softmax(logits) - onehot(target)) + grad_kl (softmax(logits) - softmax(base)), [k, V] in logits' dtype.
  //   grad_nll, grad_kl: [k], dtype of stats; zero where missing
  m.def(
      "token_losses_backward(Tensor? grad_nll, Tensor? grad_kl, Tensor logits, Tensor? target, Tensor? base, "
      "Tensor stats) -> Tensor");
}

namespace {

int fill_module(PyObject* module) { return PyModule_AddStringConstant(module, "build_info", PYMEND_BUILD_INFO); }

PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(fill_module)}, {0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, slots, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&definition); }
