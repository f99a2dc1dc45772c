// GCC 12.2's _tile_loadconfig names only 8 of the 64 bytes that `ldtilecfg` reads; the optimiser
// then drops the stores of the other 56, and the AMX module dies at its first prompt. The whole
// block is named here. See https://github.com/ggml-org/llama.cpp/pull/26954.
#if defined(__GNUC__) && !defined(__clang__) && defined(__AMX_TILE__)
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) \
    __asm__ volatile("ldtilecfg\t%X0" ::"m"(*(const char(*)[64])(config)))
#endif
