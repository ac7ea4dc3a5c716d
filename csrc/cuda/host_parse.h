// What g++ has to know to parse device code that it never compiles; see portable.cuh.
#pragma once

#include <device_launch_parameters.h>
#include <math.h>  // not <cmath>: CUDA has these names globally

#include <algorithm>

// Kernels are static and only the .cu files launch them.
#pragma GCC diagnostic ignored "-Wunused-function"

#undef __launch_bounds__
#define __launch_bounds__(...)

using std::max;
using std::min;

void __syncthreads();
void __syncwarp(unsigned mask = 0xFFFFFFFF);
int __syncthreads_or(int predicate);
int __syncthreads_and(int predicate);
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32);
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset, int width = 32);
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32);
unsigned __ballot_sync(unsigned mask, int predicate);
int __popc(unsigned x);
int __any_sync(unsigned mask, int predicate);
int atomicAdd(int* address, int value);
int atomicMax(int* address, int value);
unsigned long long atomicMax(unsigned long long* address, unsigned long long value);
int atomicMin(int* address, int value);
long long __double_as_longlong(double x);
double __longlong_as_double(long long bits);
