// What the ops include of torch: parsed once for all of them (library.py), as it takes a compiler five seconds. It is the
// first that they include, or the compiler does not take it precompiled.

#ifndef OPTC_TORCH_HEADERS_H
#define OPTC_TORCH_HEADERS_H

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#endif  // OPTC_TORCH_HEADERS_H
