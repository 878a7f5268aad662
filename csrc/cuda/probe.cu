// Compiled by nvcc.cmake to see whether nvcc, its host compiler and its runtime library work together.
#include <cuda_runtime.h>

#include <concepts>

template <std::floating_point F>
__global__ void probe(F* x) {
  x[threadIdx.x] += F(1);
}

extern "C" void launch_probe(float* x) { probe<<<1, 1>>>(x); }
