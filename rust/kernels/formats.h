// How each type of weights lies in a tile, and how a register gets at it. Only for files that are compiled for
// AVX-512.
#pragma once

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int PIECE = 32;  // values that have one scale

// Formats of weights. Each says how many pieces and bytes a unit has, how one row of it gets there, and
// what is in a piece: eight registers of unsigned bytes, and for each lane a scale and, perhaps, a minimum.
// With HALVES, sixteen values have a scale.

using Registers = __m512i[8];

inline __m512 halves_to_floats(const uint8_t * from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}

inline __m512 bytes_to_floats(const uint8_t * from) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from))));
}

inline __m512 signed_bytes_to_floats(const uint8_t * from) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from))));
}

// The first sixteen values of each row are in the low halves of 256 bytes, the others in the high ones.
inline void unpack_nibbles(const uint8_t * from, Registers w) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int i = 0; i < 4; ++i) {
        const __m512i both = _mm512_loadu_si512(from + 64 * i);
        w[i]               = _mm512_and_si512(both, low);
        w[i + 4]           = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    }
}

// A piece of one row on its way into a tile: a byte for each value.
struct Bytes {
    __m128i first, second;

    static Bytes load(const void * from) {
        const auto * at = static_cast<const __m128i *>(from);
        return {_mm_loadu_si128(at), _mm_loadu_si128(at + 1)};
    }
    Bytes lowest(int n_bits) const {
        const __m128i kept = _mm_set1_epi8(char((1 << n_bits) - 1));
        return with([=](__m128i x) { return _mm_and_si128(x, kept); });
    }
    Bytes shifted(int by) const {  // to the right, within the bytes
        const __m128i n = _mm_cvtsi32_si128(by), kept = _mm_set1_epi8(char(0xff >> by));
        return with([=](__m128i x) { return _mm_and_si128(_mm_srl_epi16(x, n), kept); });
    }

    uint32_t lowest_bits() const {
        const auto of = [](__m128i x) { return uint32_t(_mm_movemask_epi8(_mm_slli_epi16(x, 7))); };
        return of(first) | of(second) << 16;
    }

  private:
    template <class F> Bytes with(const F & f) const { return {f(first), f(second)}; }
};

inline void put_words(uint8_t * to, int row, __m128i words) {
    alignas(16) uint32_t each[4];
    _mm_store_si128(reinterpret_cast<__m128i *>(each), words);
    for (int i = 0; i < 4; ++i) {
        memcpy(to + 64 * i + 4 * row, each + i, 4);
    }
}

// For blocks in which the values are paired like that already.
inline void pack_halves(uint8_t * to, int row, const uint8_t pairs[16]) {
    put_words(to, row, _mm_loadu_si128(reinterpret_cast<const __m128i *>(pairs)));
}

inline void pack_nibbles(uint8_t * to, int row, Bytes values) {
    values = values.lowest(4);
    put_words(to, row, _mm_or_si128(values.first, _mm_slli_epi16(values.second, 4)));
}

// A fifth bit: eight masks of 64.
inline void unpack_fifth(const uint8_t * from, Registers w) {
    const __m512i bit = _mm512_set1_epi8(16);
    for (int i = 0; i < 8; ++i) {
        uint64_t mask;
        memcpy(&mask, from + 8 * i, 8);
        w[i] = _mm512_mask_add_epi8(w[i], mask, w[i], bit);
    }
}

inline void pack_fifth(uint8_t * to, int row, uint32_t bits) {
    for (int i = 0; i < 8; ++i) {
        const uint32_t four = bits >> 4 * i & 15;
        uint8_t &      byte = to[8 * i + row / 2];
        byte                = uint8_t(row % 2 ? (byte & 15) | four << 4 : four);  // rows come in order
    }
}

// A fifth and a sixth bit: four pairs in each of 128 bytes.
inline void unpack_sixth(const uint8_t * from, Registers w) {
    const __m512i bits = _mm512_set1_epi8(0x30);
    for (int i = 0; i < 2; ++i) {
        const __m512i four = _mm512_loadu_si512(from + 64 * i);
        w[4 * i + 0] = _mm512_or_si512(w[4 * i + 0], _mm512_and_si512(_mm512_slli_epi16(four, 4), bits));
        w[4 * i + 1] = _mm512_or_si512(w[4 * i + 1], _mm512_and_si512(_mm512_slli_epi16(four, 2), bits));
        w[4 * i + 2] = _mm512_or_si512(w[4 * i + 2], _mm512_and_si512(four, bits));
        w[4 * i + 3] = _mm512_or_si512(w[4 * i + 3], _mm512_and_si512(_mm512_srli_epi16(four, 2), bits));
    }
}

inline void pack_sixth(uint8_t * to, int row, Bytes pairs) {
    for (int i = 0; i < 2; ++i) {
        uint32_t at[4];
        _mm_storeu_si128(reinterpret_cast<__m128i *>(at), i ? pairs.second : pairs.first);
        const uint32_t four = at[0] | at[1] << 2 | at[2] << 4 | at[3] << 6;
        memcpy(to + 64 * i + 4 * row, &four, 4);
    }
}

inline void put(uint8_t * to, int row, const void * from, size_t size) {
    memcpy(to + size * row, from, size);
}

struct Q4_0 {
    using Block = block_q4_0;
    static constexpr int  PIECES = 2, BYTES = 2 * 256 + 2 * 32, BLOCKS = 2, ZERO = 8;
    static constexpr bool HALVES = false, HAS_MINIMUM = false;

    static void pack(const Block * from, uint8_t * to, int row) {
        for (int piece = 0; piece < PIECES; ++piece) {
            pack_halves(to + 256 * piece, row, from[piece].qs);
            put(to + 512 + 32 * piece, row, &from[piece].d, 2);
        }
    }
    static void unpack(const uint8_t * from, int piece, Registers w) {
        unpack_nibbles(from + 256 * piece, w);
    }
    static __m512 scale(const uint8_t * from, int piece, int) {
        return halves_to_floats(from + 512 + 32 * piece);
    }
};

struct Q5_0 {
    using Block = block_q5_0;
    static constexpr int  PIECES = 2, BYTES = 2 * 256 + 2 * 64 + 2 * 32, BLOCKS = 2, ZERO = 16;
    static constexpr bool HALVES = false, HAS_MINIMUM = false;

    static void pack(const Block * from, uint8_t * to, int row) {
        for (int piece = 0; piece < PIECES; ++piece) {
            uint32_t bits;
            memcpy(&bits, from[piece].qh, 4);
            pack_halves(to + 256 * piece, row, from[piece].qs);
            pack_fifth(to + 512 + 64 * piece, row, bits);
            put(to + 640 + 32 * piece, row, &from[piece].d, 2);
        }
    }
    static void unpack(const uint8_t * from, int piece, Registers w) {
        unpack_nibbles(from + 256 * piece, w);
        unpack_fifth(from + 512 + 64 * piece, w);
    }
    static __m512 scale(const uint8_t * from, int piece, int) {
        return halves_to_floats(from + 640 + 32 * piece);
    }
};

struct Q8_0 {
    using Block = block_q8_0;
    static constexpr int  PIECES = 2, BYTES = 2 * 512 + 2 * 32, BLOCKS = 2, ZERO = 128;
    static constexpr bool HALVES = false, HAS_MINIMUM = false;

    static void pack(const Block * from, uint8_t * to, int row) {
        for (int piece = 0; piece < PIECES; ++piece) {
            const Bytes   values = Bytes::load(from[piece].qs);
            const __m128i zero   = _mm_set1_epi8(char(ZERO));
            put_words(to + 512 * piece, row, _mm_add_epi8(values.first, zero));
            put_words(to + 512 * piece + 256, row, _mm_add_epi8(values.second, zero));
            put(to + 1024 + 32 * piece, row, &from[piece].d, 2);
        }
    }
    static void unpack(const uint8_t * from, int piece, Registers w) {
        for (int i = 0; i < 8; ++i) {
            w[i] = _mm512_loadu_si512(from + 512 * piece + 64 * i);
        }
    }
    static __m512 scale(const uint8_t * from, int piece, int) {
        return halves_to_floats(from + 1024 + 32 * piece);
    }
};

// The scales and minima of 256 values: eight of each, in units of one scale and one minimum.
struct KScales {
    static constexpr int BYTES = 2 * 32 + 2 * 128;

    template <class Block> static void pack(const Block * from, uint8_t * to, int row) {
        const auto *    both   = reinterpret_cast<const uint8_t *>(from);  // two halves begin a block
        const uint8_t * packed = from->scales;
        put(to, row, both, 2);
        put(to + 32, row, both + 2, 2);
        for (int i = 0; i < 8; ++i) {
            const bool first = i < 4;
            to[64 + 16 * i + row] =
                uint8_t(first ? packed[i] & 63 : (packed[i + 4] & 15) | (packed[i - 4] >> 6) << 4);
            to[192 + 16 * i + row] =
                uint8_t(first ? packed[i + 4] & 63 : packed[i + 4] >> 4 | (packed[i] >> 6) << 4);
        }
    }
    static __m512 scale(const uint8_t * from, int piece) {
        return _mm512_mul_ps(halves_to_floats(from), bytes_to_floats(from + 64 + 16 * piece));
    }
    static __m512 minimum(const uint8_t * from, int piece) {
        return _mm512_mul_ps(halves_to_floats(from + 32), bytes_to_floats(from + 192 + 16 * piece));
    }
};

struct Q4_K {
    using Block = block_q4_K;
    static constexpr int  PIECES = 8, BYTES = 8 * 256 + KScales::BYTES, BLOCKS = 1, ZERO = 0;
    static constexpr bool HALVES = false, HAS_MINIMUM = true;

    static void pack(const Block * from, uint8_t * to, int row) {
        for (int piece = 0; piece < PIECES; ++piece) {
            const Bytes both = Bytes::load(from->qs + piece / 2 * PIECE);
            pack_nibbles(to + 256 * piece, row, both.shifted(piece % 2 * 4));
        }
        KScales::pack(from, to + 2048, row);
    }
    static void unpack(const uint8_t * from, int piece, Registers w) {
        unpack_nibbles(from + 256 * piece, w);
    }
    static __m512 scale(const uint8_t * from, int piece, int) { return KScales::scale(from + 2048, piece); }
    static __m512 minimum(const uint8_t * from, int piece) { return KScales::minimum(from + 2048, piece); }
};

struct Q5_K {
    using Block = block_q5_K;
    static constexpr int  PIECES = 8, BYTES = 8 * (256 + 64) + KScales::BYTES, BLOCKS = 1, ZERO = 0;
    static constexpr bool HALVES = false, HAS_MINIMUM = true;

    static void pack(const Block * from, uint8_t * to, int row) {
        for (int piece = 0; piece < PIECES; ++piece) {
            const Bytes both = Bytes::load(from->qs + piece / 2 * PIECE);
            const Bytes high = Bytes::load(from->qh).shifted(piece);
            pack_nibbles(to + 256 * piece, row, both.shifted(piece % 2 * 4));
            pack_fifth(to + 2048 + 64 * piece, row, high.lowest_bits());
        }
        KScales::pack(from, to + 2560, row);
    }
    static void unpack(const uint8_t * from, int piece, Registers w) {
        unpack_nibbles(from + 256 * piece, w);
        unpack_fifth(from + 2048 + 64 * piece, w);
    }
    static __m512 scale(const uint8_t * from, int piece, int) { return KScales::scale(from + 2560, piece); }
    static __m512 minimum(const uint8_t * from, int piece) { return KScales::minimum(from + 2560, piece); }
};

struct Q6_K {
    using Block = block_q6_K;
    // 32 bytes more than needed: units begin where cache lines do.
    static constexpr int  PIECES = 8, BYTES = 8 * (256 + 128) + 16 * 16 + 64, BLOCKS = 1, ZERO = 32;
    static constexpr bool HALVES = true, HAS_MINIMUM = false;

    static void pack(const Block * from, uint8_t * to, int row) {
        for (int piece = 0; piece < PIECES; ++piece) {
            const Bytes low  = Bytes::load(from->ql + piece / 4 * 64 + piece % 2 * PIECE);
            const Bytes high = Bytes::load(from->qh + piece / 4 * PIECE);
            pack_nibbles(to + 256 * piece, row, low.shifted(piece % 4 / 2 * 4));
            pack_sixth(to + 2048 + 128 * piece, row, high.shifted(piece % 4 * 2).lowest(2));
        }
        for (int i = 0; i < 16; ++i) {
            to[3072 + 16 * i + row] = uint8_t(from->scales[i]);
        }
        put(to + 3328, row, &from->d, 2);
    }
    static void unpack(const uint8_t * from, int piece, Registers w) {
        unpack_nibbles(from + 256 * piece, w);
        unpack_sixth(from + 2048 + 128 * piece, w);
    }
    static __m512 scale(const uint8_t * from, int piece, int half) {
        return _mm512_mul_ps(halves_to_floats(from + 3328),
                             signed_bytes_to_floats(from + 3072 + 16 * (2 * piece + half)));
    }
};

}  // namespace
