// What is computed in ways of our own on the CPU; see rust/cmake/llama.cmake for how it gets there.
#pragma once

#include "traits.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"

// How to compute this operation, if it is attention of a kind that has a kernel here.
ggml::cpu::tensor_traits * flash_attention(const ggml_tensor * op);
