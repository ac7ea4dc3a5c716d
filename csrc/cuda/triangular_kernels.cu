// Compiles the triangular solves with few right-hand sides.
#include "triangular.cuh"
