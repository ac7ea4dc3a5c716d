// All kernels of the spectrum operators, for one instruction set (spectrum_kernels.h). Blank lines
// keep the order: each body uses those before it.

#include "simd.inl"

#include "dense_products.inl"

#include "khatri_rao.inl"

#include "tridiagonal.inl"

#include "band.inl"

#include "resolvent.inl"

#include "sturm.inl"

#include "gram_route.inl"

#include "symmetric_route.inl"
