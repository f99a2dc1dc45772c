// Flash attention over a cache of f16 for processors with AVX-512.
//
// ggml's takes one query at a time, or 64 of one head, and turns the cache into f32 for each of them. Here
// the queries that look at the same keys and values go together: all heads of a group, and the tokens of
// a prompt. Sixteen of them fill the lanes of a register ("wide"), so that softmax crosses no lanes; the
// few of a single token would leave lanes empty, and there the cells fill them ("narrow").
//
// What a query gets does not depend on who else is in the step, nor on the number of threads: both ways
// round alike. A score is summed value by value; cells are taken in blocks of 64, whose weights go to
// sixteen sums, one for each lane that a cell would have; and 256 cells make a part, and parts are joined
// in their order.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int     LANES  = 16;
constexpr int     WIDE   = 16;   // queries of a wide panel,
constexpr int     NARROW = 8;    // and at most of a narrow one
constexpr int64_t FEW    = 14;   // up to so many, narrow panels are faster
constexpr int     BLOCK  = 64;   // cells whose scores are looked at together
constexpr int     VALUES = 32;   // cells whose values are turned into floats at a time
constexpr int64_t PART   = 256;  // cells that one thread takes without the others
constexpr int     LINE   = 64;   // bytes

// The lowest score: as far away as -INFINITY, but the difference of two of them is a number.
constexpr float NOTHING = -1e30f;
constexpr float LOG2_E  = 1.44269504f;

using Half = ggml_fp16_t;

inline __m512i lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

inline __m512 to_floats(const Half * from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}

// 2^x to about 2 parts in 10 million; nothing for what is too small, and what is not a number stays so.
inline __m512 exp2(__m512 x) {
    const __mmask16 is_there = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126), _CMP_NLT_UQ);
    const __m512 n  = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f  = _mm512_sub_ps(x, n);
    __m512       p  = _mm512_set1_ps(1.5403530e-4f);
    for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f}) {
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
    }
    return _mm512_maskz_scalef_ps(is_there, p, n);
}

inline float exp2_of(float x) { return _mm512_cvtss_f32(exp2(_mm512_set1_ps(x))); }

// Rows become columns.
inline void transpose(__m512 x[LANES]) {
    __m512 y[LANES];
    for (int i = 0; i < LANES; i += 2) {
        y[i]     = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    const auto pairs = [](__m512 a, __m512 b, bool high) {
        const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
        return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(c, d) : _mm512_unpacklo_pd(c, d));
    };
    for (int i = 0; i < LANES; i += 4) {
        x[i]     = pairs(y[i], y[i + 2], false);
        x[i + 1] = pairs(y[i], y[i + 2], true);
        x[i + 2] = pairs(y[i + 1], y[i + 3], false);
        x[i + 3] = pairs(y[i + 1], y[i + 3], true);
    }
    for (int i = 0; i < LANES; i += 8) {
        for (int k = 0; k < 4; ++k) {
            y[i + k]     = _mm512_shuffle_f32x4(x[i + k], x[i + k + 4], 0x88);
            y[i + k + 4] = _mm512_shuffle_f32x4(x[i + k], x[i + k + 4], 0xdd);
        }
    }
    for (int k = 0; k < 4; ++k) {
        x[k]      = _mm512_shuffle_f32x4(y[k], y[k + 8], 0x88);
        x[k + 8]  = _mm512_shuffle_f32x4(y[k], y[k + 8], 0xdd);
        x[k + 4]  = _mm512_shuffle_f32x4(y[k + 4], y[k + 12], 0x88);
        x[k + 12] = _mm512_shuffle_f32x4(y[k + 4], y[k + 12], 0xdd);
    }
}

// The sum of sixteen, in the one order that all sums have here.
inline float  plus(float a, float b) { return a + b; }
inline __m512 plus(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
template <class T> T sum_of(T x[LANES]) {
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) {
            x[i] = plus(x[i], x[i + half]);
        }
    }
    return x[0];
}

// One GGML_OP_FLASH_ATTN_EXT. Queries of a stream and a group of heads are numbered token by token.
struct Work {
    const ggml_tensor *q, *k, *v, *mask, *sinks;
    ggml_tensor *      out;
    int64_t            dim, group, n_cells, n_groups, n_streams, n_queries;
    int64_t            n_panels;  // of a group's queries
    int64_t            n_parts;   // of the cells
    int64_t            n_shares;  // of the groups
    float              scale, max_bias;

    Work(ggml_tensor * op, int n_threads)
        : q(op->src[0]), k(op->src[1]), v(op->src[2]), mask(op->src[3]), sinks(op->src[4]), out(op),
          dim(q->ne[0]), group(q->ne[2] / k->ne[2]), n_cells(k->ne[1]), n_groups(k->ne[2]),
          n_streams(q->ne[3]), n_queries(q->ne[1] * group) {
        memcpy(&scale, op->op_params, sizeof(float));
        memcpy(&max_bias, op->op_params + 1, sizeof(float));
        const int64_t height = is_narrow() ? NARROW : WIDE;
        n_panels             = (n_queries + height - 1) / height;
        n_parts = (n_cells + PART - 1) / PART;
        // Groups lie side by side in the cache, so a narrow panel, which computes no longer than it reads, takes
        // all of them, one block of cells after the other; unless there are too few parts for the threads.
        const int64_t at_once = n_panels * n_streams * n_parts;
        n_shares = is_narrow() ? std::min(n_groups, (4 * n_threads + at_once - 1) / at_once) : n_groups;
    }

    bool    is_narrow() const { return n_queries <= FEW; }
    int64_t n_places() const { return n_panels * n_shares * n_streams; }
    int64_t groups_at_once() const { return (n_groups + n_shares - 1) / n_shares; }

    // What threads take one after the other: a narrow panel part by part, which are joined afterwards.
    int64_t n_pieces() const { return is_narrow() ? n_places() * n_parts : n_places(); }

    // What a thread needs for itself, and what a part leaves behind, in floats.
    size_t own_size() const {
        const int64_t wide   = dim * (3 * WIDE + VALUES) + (BLOCK + LANES) * WIDE;
        const int64_t narrow = groups_at_once() * NARROW * (2 * dim + LANES + 1) + dim * BLOCK;
        return size_t((is_narrow() ? narrow : wide) + LANES - 1) / LANES * LANES;
    }
    size_t part_size() const { return size_t(groups_at_once() * NARROW * (dim + 2)); }

    size_t bytes(int n_threads) const {
        const size_t parts = is_narrow() ? size_t(n_pieces()) * part_size() : 0;
        return (size_t(n_threads) * own_size() + parts) * sizeof(float) + 64;
    }

    template <class T> static T * row(const ggml_tensor * t, int64_t i1, int64_t i2, int64_t i3) {
        auto * data = static_cast<uint8_t *>(t->data);
        return reinterpret_cast<T *>(data + size_t(i1) * t->nb[1] + size_t(i2) * t->nb[2] + size_t(i3) * t->nb[3]);
    }

    // ALiBi, as ggml numbers its heads.
    float slope(int64_t head) const {
        if (max_bias <= 0) {
            return 1;
        }
        const auto n = float(1u << uint32_t(std::floor(std::log2(double(q->ne[2])))));
        return float(head) < n ? std::exp2(-max_bias / n * float(head + 1))
                               : std::exp2(-max_bias / 2 / n * float(2 * (int64_t(head) - int64_t(n)) + 1));
    }
};

// Keys or values of one group, from one cell on.
struct Rows {
    const uint8_t * at;
    size_t          step;

    const Half * operator[](int64_t i) const { return reinterpret_cast<const Half *>(at + size_t(i) * step); }
};

// Where the keys and the values of a block of cells begin, if there is one.
struct Block {
    const uint8_t *keys = nullptr, *values = nullptr;
};

// Calls for memory that will be needed soon, some lines at each turn of a loop that computes something else: many
// at once would keep the processor waiting as reading does.
struct Ahead {
    const uint8_t * at    = nullptr;
    int             lines = 0;  // at each turn

    Ahead() = default;
    Ahead(const uint8_t * from, int64_t bytes, int turns)
        : at(from), lines(int((bytes / LINE + turns - 1) / turns)) {}

    void call(int turn) const {
        for (int i = 0; i < lines; ++i) {
            _mm_prefetch(reinterpret_cast<const char *>(at + (turn * lines + i) * LINE), _MM_HINT_T0);
        }
    }
    Ahead after(int turns) const {
        Ahead other = *this;
        other.at += turns * lines * LINE;
        return other;
    }
};

// Queries of one panel, and the cells that one thread lets them look at.
struct Panel {
    const Work & work;
    int64_t      stream, group, n_groups, begin, from, to;
    int          height;
    float *      own;

    Panel(const Work & work_, int64_t place, int64_t part, float * own_) : work(work_), own(own_) {
        const int64_t panel = place % work.n_panels, share = place / work.n_panels % work.n_shares;
        group    = work.n_groups * share / work.n_shares;
        n_groups = work.n_groups * (share + 1) / work.n_shares - group;
        stream   = place / work.n_panels / work.n_shares;
        begin    = work.n_queries * panel / work.n_panels;
        height   = int(work.n_queries * (panel + 1) / work.n_panels - begin);
        from     = part * PART;
        to       = std::min(work.n_cells, from + PART);
    }

    Panel of_group(int64_t i) const {
        Panel other = *this;
        other.group += i;
        return other;
    }

    int64_t token(int i) const { return (begin + i) / work.group; }
    int64_t head(int i) const { return group * work.group + (begin + i) % work.group; }

    float slope(int i) const { return work.slope(head(i)) * LOG2_E; }

    const float * query(int i) const { return Work::row<float>(work.q, token(i), head(i), stream); }
    Rows          keys(int64_t cell) const { return {Work::row<uint8_t>(work.k, cell, group, stream), work.k->nb[1]}; }
    Rows          values(int64_t cell) const { return {Work::row<uint8_t>(work.v, cell, group, stream), work.v->nb[1]}; }
    Block         block(int64_t cell) const { return {keys(cell).at, values(cell).at}; }

    // Groups lie side by side, and a processor that reads one of them does not see what comes next in memory. With
    // two queries and more of each, computing a block takes so long that the lines of the next can be called for
    // meanwhile, if they follow each other. A single one does little but read.
    bool calls_ahead() const {
        const size_t bytes = size_t(n_groups * work.dim) * sizeof(Half);
        return height > 1 && work.k->nb[1] == bytes && work.v->nb[1] == bytes;
    }

    // What was not called for is read once from end to end before any group needs it: up to 2.4 times as fast,
    // where the cache of a layer is larger than the processor's.
    void read_ahead(int64_t cell, int64_t count) const {
        if (n_groups == 1) {
            return;
        }
        const int64_t bytes = n_groups * work.dim * int64_t(sizeof(Half));
        __m512i       seen  = _mm512_setzero_si512();
        for (const Rows & rows : {keys(cell), values(cell)}) {
            for (int64_t c = 0; c < count; ++c) {
                for (int64_t i = 0; i + LINE <= bytes; i += LINE) {
                    seen = _mm512_xor_si512(seen, _mm512_loadu_si512(reinterpret_cast<const uint8_t *>(rows[c]) + i));
                }
            }
        }
        __asm__ volatile("" ::"v"(seen));  // for nothing else
    }
    float *       output(int i) const {
        const int64_t row = (stream * work.out->ne[2] + token(i)) * work.out->ne[1] + head(i);
        return reinterpret_cast<float *>(static_cast<uint8_t *>(work.out->data) + size_t(row) * work.out->nb[1]);
    }
    const Half * mask(int64_t token) const {
        return work.mask ? Work::row<Half>(work.mask, token, 0, stream % work.mask->ne[3]) : nullptr;
    }

    enum Sight { NONE, SOME, ALL };

    // How much of `count` cells the panel's tokens see: a mask is nearly always all or nothing.
    Sight sight(int64_t cell, int64_t count) const {
        if (!work.mask) {
            return ALL;
        }
        bool all = true, none = true;
        for (int64_t t = token(0); t <= token(height - 1) && (all || none); ++t) {
            const Half * at = mask(t) + cell;
            for (int64_t i = 0; i < count; i += 32) {
                const __mmask32 lanes = count - i >= 32 ? ~0u : (1u << (count - i)) - 1;
                const __m512i   bits  = _mm512_maskz_loadu_epi16(lanes, at + i);
                all &= _mm512_mask_test_epi16_mask(lanes, bits, _mm512_set1_epi16(0x7fff)) == 0;
                none &= _mm512_mask_cmpneq_epi16_mask(lanes, bits, _mm512_set1_epi16(int16_t(0xfc00))) == 0;
            }
        }
        return all ? ALL : none ? NONE : SOME;
    }
};

// What a query has found: the highest score, and the sum of all weights. Beside it is the sum of what was
// weighted.
struct Found {
    float highest, weights;
};

void write(const Panel & panel, int i, Found found, const float * sum, size_t step) {
    const Work & work = panel.work;
    float        by   = 1;
    if (work.sinks) {  // a score that nothing belongs to
        const float sink    = static_cast<const float *>(work.sinks->data)[panel.head(i)] * LOG2_E;
        const float highest = std::max(found.highest, sink);
        by                  = exp2_of(found.highest - highest);
        found.weights       = std::fma(found.weights, by, exp2_of(sink - highest));
    }
    by = found.weights == 0 ? 0 : by / found.weights;

    float *       to    = panel.output(i);
    const __m512i lanes = _mm512_mullo_epi32(lane_numbers(), _mm512_set1_epi32(int(step)));
    for (int64_t d = 0; d < work.dim; d += LANES) {
        const float * at = sum + size_t(d) * step;
        const __m512  x  = step == 1 ? _mm512_loadu_ps(at) : _mm512_i32gather_ps(lanes, at, 4);
        _mm512_storeu_ps(to + d, _mm512_mul_ps(x, _mm512_set1_ps(by)));
    }
}

// Sixteen queries, each with a lane of its own.
class WidePanel {
    const Panel & panel;
    const int64_t dim;
    float *const  q, *const sum, *const all, *const values, *const scores, *const totals;
    float         slopes[WIDE] = {};
    __m512        highest, all_highest = _mm512_set1_ps(NOTHING), all_weights = _mm512_setzero_ps();

  public:
    explicit WidePanel(const Panel & panel_)
        : panel(panel_), dim(panel.work.dim), q(panel.own), sum(q + dim * WIDE), all(sum + dim * WIDE),
          values(all + dim * WIDE), scores(values + dim * VALUES), totals(scores + BLOCK * WIDE) {
        std::fill(q, q + dim * WIDE, 0.0f);
        std::fill(all, all + dim * WIDE, 0.0f);
        for (int i = 0; i < panel.height; ++i) {
            const float * from = panel.query(i);
            slopes[i]          = panel.slope(i);
            for (int64_t d = 0; d < dim; ++d) {
                q[d * WIDE + i] = from[d] * panel.work.scale * LOG2_E;
            }
        }
    }

    // Inlined, or what is stored counts as a change of every member: a third slower.
    [[gnu::always_inline]] void attend() {
        for (int64_t from = 0; from < panel.work.n_cells; from += PART) {
            const int64_t to = std::min(panel.work.n_cells, from + PART);
            if (panel.sight(from, to - from) == Panel::NONE) {
                continue;
            }
            highest = _mm512_set1_ps(NOTHING);
            std::fill(sum, sum + dim * WIDE, 0.0f);
            std::fill(totals, totals + LANES * WIDE, 0.0f);
            for (int64_t cell = from; cell < to; cell += BLOCK) {
                const int          count = int(std::min<int64_t>(BLOCK, to - cell));
                const Panel::Sight sight = panel.sight(cell, count);
                if (sight != Panel::NONE) {
                    score(cell, count, sight);
                    add_values(cell, count, weigh(count));
                }
            }
            join();
        }
        float top[WIDE], weights[WIDE];
        _mm512_storeu_ps(top, all_highest);
        _mm512_storeu_ps(weights, all_weights);
        for (int i = 0; i < panel.height; ++i) {
            write(panel, i, {top[i], weights[i]}, all + i, WIDE);
        }
    }

  private:
    void score(int64_t cell, int count, Panel::Sight sight) {
        for (int first = 0; first < count; first += LANES) {
            const int  n    = std::min(LANES, count - first);
            const Rows keys = panel.keys(cell + first);
            for (int c = 0; c < n; ++c) {
                for (int64_t d = 0; d < dim; d += LANES) {
                    _mm512_storeu_ps(values + c * dim + d, to_floats(keys[c] + d));
                }
            }
            __m512 s[LANES];
            for (int c = 0; c < LANES; ++c) {
                s[c] = _mm512_setzero_ps();
            }
            for (int64_t d = 0; d < dim; ++d) {
                const __m512 lanes = _mm512_loadu_ps(q + d * WIDE);
#pragma GCC unroll 16
                for (int c = 0; c < LANES; ++c) {  // beyond `n`, of something older
                    s[c] = _mm512_fmadd_ps(lanes, _mm512_set1_ps(values[c * dim + d]), s[c]);
                }
            }
            for (int c = 0; c < LANES; ++c) {
                _mm512_storeu_ps(scores + (first + c) * WIDE, s[c]);
            }
        }
        if (sight == Panel::SOME) {
            add_mask(cell, count);
        }
    }

    void add_mask(int64_t cell, int count) {
        for (int first = 0; first < count; first += LANES) {
            const auto lanes = __mmask16(count - first >= LANES ? 0xffff : (1 << (count - first)) - 1);
            __m512     add[WIDE];
            for (int i = 0; i < WIDE; ++i) {
                const Half * mask = panel.mask(panel.token(std::min(i, panel.height - 1))) + cell + first;
                add[i] = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, mask)),
                                       _mm512_set1_ps(slopes[i]));
            }
            transpose(add);
            for (int c = 0; c < LANES; ++c) {
                float * at = scores + (first + c) * WIDE;
                _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), add[c]));
            }
        }
    }

    // Scores become weights. What comes back is how much less what was summed so far is worth.
    __m512 weigh(int count) {
        __m512 higher = highest;
        for (int c = 0; c < count; ++c) {
            higher = _mm512_max_ps(higher, _mm512_loadu_ps(scores + c * WIDE));
        }
        const __m512 fade = exp2(_mm512_sub_ps(highest, higher));
        highest           = higher;
        for (int i = 0; i < LANES; ++i) {
            __m512 total = _mm512_mul_ps(_mm512_loadu_ps(totals + i * WIDE), fade);
            for (int c = i; c < count; c += LANES) {
                const __m512 weight = exp2(_mm512_sub_ps(_mm512_loadu_ps(scores + c * WIDE), higher));
                _mm512_storeu_ps(scores + c * WIDE, weight);
                total = _mm512_add_ps(total, weight);
            }
            _mm512_storeu_ps(totals + i * WIDE, total);
        }
        return fade;
    }

    void add_values(int64_t cell, int count, __m512 fade) {
        for (int first = 0; first < count; first += VALUES) {
            const int  n    = std::min(VALUES, count - first);
            const Rows rows = panel.values(cell + first);
            for (int c = 0; c < n; ++c) {
                for (int64_t d = 0; d < dim; d += LANES) {
                    _mm512_storeu_ps(values + c * dim + d, to_floats(rows[c] + d));
                }
            }
            for (int64_t d = 0; d < dim; d += LANES) {
                __m512 s[LANES];
                for (int i = 0; i < LANES; ++i) {
                    s[i] = _mm512_loadu_ps(sum + (d + i) * WIDE);
                    s[i] = first ? s[i] : _mm512_mul_ps(fade, s[i]);
                }
                for (int c = 0; c < n; ++c) {
                    const float * at     = values + c * dim + d;
                    const __m512  weight = _mm512_loadu_ps(scores + (first + c) * WIDE);
#pragma GCC unroll 16
                    for (int i = 0; i < LANES; ++i) {
                        s[i] = _mm512_fmadd_ps(weight, _mm512_set1_ps(at[i]), s[i]);
                    }
                }
                for (int i = 0; i < LANES; ++i) {
                    _mm512_storeu_ps(sum + (d + i) * WIDE, s[i]);
                }
            }
        }
    }

    // A part is over.
    void join() {
        __m512 each[LANES];
        for (int i = 0; i < LANES; ++i) {
            each[i] = _mm512_loadu_ps(totals + i * WIDE);
        }
        const __m512 top = _mm512_max_ps(all_highest, highest);
        const __m512 before = exp2(_mm512_sub_ps(all_highest, top)), now = exp2(_mm512_sub_ps(highest, top));
        all_weights = _mm512_fmadd_ps(sum_of(each), now, _mm512_mul_ps(all_weights, before));
        all_highest = top;
        for (int64_t d = 0; d < dim * WIDE; d += WIDE) {
            const __m512 old = _mm512_mul_ps(_mm512_loadu_ps(all + d), before);
            _mm512_storeu_ps(all + d, _mm512_fmadd_ps(_mm512_loadu_ps(sum + d), now, old));
        }
    }
};

// Queries are computed in batches, of one to four.
constexpr int n_batches(int n_queries, int most) { return (n_queries + most - 1) / most; }

template <int MOST, class F> void for_each_batch(int n_queries, const F & f) {
    for (int r = 0; r < n_queries; r += MOST) {
        switch (std::min(MOST, n_queries - r)) {
            case 1: f(r, std::integral_constant<int, 1>()); break;
            case 2: f(r, std::integral_constant<int, std::min(MOST, 2)>()); break;
            case 3: f(r, std::integral_constant<int, std::min(MOST, 3)>()); break;
            case 4: f(r, std::integral_constant<int, std::min(MOST, 4)>()); break;
        }
    }
}

// The weighted values of a block of cells are added to `R` queries' sums.
template <int N, int R>
void add_values(Rows values, int count, const float * weights, const float * fade, float * sum, Ahead ahead) {
    constexpr int DIM = N * LANES;
    __m512        s[R][N];
    for (int r = 0; r < R; ++r) {
        for (int n = 0; n < N; ++n) {
            s[r][n] = _mm512_mul_ps(_mm512_set1_ps(fade[r]), _mm512_loadu_ps(sum + r * DIM + n * LANES));
        }
    }
    for (int c = 0; c < count; ++c) {
        ahead.call(c);
        __m512 v[N];
        for (int n = 0; n < N; ++n) {
            v[n] = to_floats(values[c] + n * LANES);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const __m512 weight = _mm512_set1_ps(weights[r * BLOCK + c]);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) {
                s[r][n] = _mm512_fmadd_ps(weight, v[n], s[r][n]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int n = 0; n < N; ++n) {
            _mm512_storeu_ps(sum + r * DIM + n * LANES, s[r][n]);
        }
    }
}

// The scores of `R` queries with the keys of a block: of sixteen cells after the other, one value of all.
template <int R> void score(int64_t dim, const float * keys, const float * q, float * scores, Ahead ahead) {
    constexpr int N = BLOCK / LANES;
    __m512        s[R][N];
    for (int r = 0; r < R; ++r) {
        for (int n = 0; n < N; ++n) {
            s[r][n] = _mm512_setzero_ps();
        }
    }
    for (int64_t d = 0; d < dim; ++d) {
        ahead.call(d);
        __m512 k[N];
        for (int n = 0; n < N; ++n) {
            k[n] = _mm512_loadu_ps(keys + (n * dim + d) * LANES);
        }
        for (int r = 0; r < R; ++r) {
            const __m512 value = _mm512_set1_ps(q[r * dim + d]);
            for (int n = 0; n < N; ++n) {
                s[r][n] = _mm512_fmadd_ps(value, k[n], s[r][n]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int n = 0; n < N; ++n) {
            _mm512_store_ps(scores + r * BLOCK + n * LANES, s[r][n]);
        }
    }
}

// The weights of a block of cells for one group's queries; what was summed so far is to fade by `fade`.
template <int N>
void weigh(const Panel & panel, int64_t cell, int count, Panel::Sight sight, const float * q, float * keys,
           float * highest, float * totals, float * weights, float * fade, Ahead ahead) {
    constexpr int DIM  = N * LANES;
    const Rows    rows = panel.keys(cell);
    for (int first = 0; first < BLOCK; first += LANES) {
        for (int n = 0; n < N; ++n) {
            __m512 x[LANES];
            for (int c = 0; c < LANES; ++c) {
                x[c] = to_floats(rows[std::min(first + c, count - 1)] + n * LANES);
            }
            transpose(x);
            for (int i = 0; i < LANES; ++i) {
                _mm512_storeu_ps(keys + first * DIM + (n * LANES + i) * LANES, x[i]);
            }
        }
    }
    for_each_batch<4>(panel.height, [&](int r, auto n) {
        score<n>(DIM, keys, q + r * DIM, weights + r * BLOCK, ahead.after(r / 4 * DIM));
    });
    for (int r = 0; r < panel.height; ++r) {
        float * of     = weights + r * BLOCK;
        __m512  higher = _mm512_set1_ps(highest[r]);
        for (int first = 0; first < BLOCK; first += LANES) {
            const int  n     = std::clamp(count - first, 0, LANES);
            const auto lanes = __mmask16((1 << n) - 1);
            __m512     score = _mm512_load_ps(of + first);
            if (sight == Panel::SOME) {
                const Half * mask = panel.mask(panel.token(r)) + cell + first;
                score = _mm512_add_ps(score, _mm512_mul_ps(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, mask)),
                                                           _mm512_set1_ps(panel.slope(r))));
            }
            score = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), lanes, score);
            _mm512_store_ps(of + first, score);
            higher = _mm512_max_ps(higher, score);
        }
        const float top = _mm512_reduce_max_ps(higher);
        fade[r]         = exp2_of(highest[r] - top);
        highest[r]      = top;
        __m512 total    = _mm512_mul_ps(_mm512_loadu_ps(totals + r * LANES), _mm512_set1_ps(fade[r]));
        for (int c = 0; c < count; c += LANES) {
            const __m512 weight = exp2(_mm512_sub_ps(_mm512_load_ps(of + c), _mm512_set1_ps(top)));
            total               = _mm512_add_ps(total, weight);
            _mm512_store_ps(of + c, weight);
        }
        _mm512_storeu_ps(totals + r * LANES, total);
    }
}

// A few queries of each group, of `N` registers each, and one part of the cells. While a block is computed, the next is
// called for, and at last the one that is to come after this part, if any.
template <int N> void attend_narrow(const Panel & panel, float * part, bool is_called, Block coming) {
    constexpr int DIM     = N * LANES;
    const int64_t n_all   = panel.n_groups * NARROW;
    float *       q       = panel.own;               // n_all x DIM
    float *       sum     = q + n_all * DIM;         // n_all x DIM
    float *       totals  = sum + n_all * DIM;       // n_all x LANES
    float *       keys    = totals + n_all * LANES;  // BLOCK x DIM
    float *       highest = keys + BLOCK * DIM;      // n_all
    alignas(64) float weights[NARROW * BLOCK];
    float             fade[NARROW];
    std::fill(sum, keys, 0.0f);
    std::fill(highest, highest + n_all, NOTHING);
    for (int64_t g = 0; g < panel.n_groups; ++g) {
        for (int r = 0; r < panel.height; ++r) {
            const float * from = panel.of_group(g).query(r);
            for (int d = 0; d < DIM; ++d) {
                q[(g * NARROW + r) * DIM + d] = from[d] * panel.work.scale * LOG2_E;
            }
        }
    }
    const bool calls = panel.calls_ahead();
    for (int64_t cell = panel.from; cell < panel.to; cell += BLOCK) {
        const int          count = int(std::min<int64_t>(BLOCK, panel.to - cell));
        const Panel::Sight sight = panel.sight(cell, count);
        if (sight == Panel::NONE) {
            is_called = false;
            continue;
        }
        if (!is_called) {
            panel.read_ahead(cell, count);
        }
        const Block next = cell + BLOCK < panel.to ? panel.block(cell + BLOCK) : coming;
        is_called        = calls && next.keys;
        for (int64_t g = 0; g < panel.n_groups; ++g) {
            const Panel   one   = panel.of_group(g);
            const int64_t at    = g * NARROW;
            constexpr int BYTES = BLOCK * DIM * int(sizeof(Half)), MOST = std::clamp(28 / N - 1, 1, 4);  // by registers
            Ahead         of_keys, of_values;
            if (is_called) {
                of_keys   = Ahead(next.keys + g * BYTES, BYTES, n_batches(panel.height, 4) * DIM);
                of_values = Ahead(next.values + g * BYTES, BYTES, n_batches(panel.height, MOST) * BLOCK);
            }
            weigh<N>(one, cell, count, sight, q + at * DIM, keys, highest + at, totals + at * LANES, weights, fade,
                     of_keys);
            for_each_batch<MOST>(panel.height, [&](int r, auto n) {
                add_values<N, n>(one.values(cell), count, weights + r * BLOCK, fade + r, sum + (at + r) * DIM,
                                 of_values.after(r / MOST * BLOCK));
            });
        }
    }
    for (int64_t g = 0; g < panel.n_groups; ++g) {
        for (int r = 0; r < panel.height; ++r) {
            const int64_t at = g * NARROW + r;
            float *       to = part + at * (DIM + 2);
            to[0]            = highest[at];
            to[1]            = sum_of(totals + at * LANES);
            std::copy(sum + at * DIM, sum + (at + 1) * DIM, to + 2);
        }
    }
}

void attend_narrow(const Panel & panel, float * part, bool is_called, Block coming) {
    switch (panel.work.dim / LANES) {
        case 2: return attend_narrow<2>(panel, part, is_called, coming);
        case 4: return attend_narrow<4>(panel, part, is_called, coming);
        case 5: return attend_narrow<5>(panel, part, is_called, coming);
        case 6: return attend_narrow<6>(panel, part, is_called, coming);
        case 8: return attend_narrow<8>(panel, part, is_called, coming);
        case 16: return attend_narrow<16>(panel, part, is_called, coming);
    }
}

bool has_kernel(int64_t dim) {
    return dim == 32 || dim == 64 || dim == 80 || dim == 96 || dim == 128 || dim == 256;
}

// What the parts of a narrow panel's cells have found, together.
void join(const Work & work, int64_t place, const float * parts, float * own) {
    const Panel panel(work, place, 0, own);
    for (int64_t i = 0; i < panel.n_groups * panel.height; ++i) {
        const int64_t group = i / panel.height, row = i % panel.height;
        Found         all = {NOTHING, 0};
        std::fill(own, own + work.dim, 0.0f);
        for (int64_t part = 0; part < work.n_parts; ++part) {
            const float * from = parts + size_t(part) * work.part_size() + (group * NARROW + row) * (work.dim + 2);
            const float   top  = from[0] <= all.highest ? all.highest : from[0];
            const float   before = exp2_of(all.highest - top), now = exp2_of(from[0] - top);
            all.weights          = std::fma(from[1], now, all.weights * before);
            all.highest          = top;
            for (int64_t d = 0; d < work.dim; d += LANES) {
                const __m512 old = _mm512_mul_ps(_mm512_loadu_ps(own + d), _mm512_set1_ps(before));
                const __m512 add = _mm512_loadu_ps(from + 2 + d);
                _mm512_storeu_ps(own + d, _mm512_fmadd_ps(add, _mm512_set1_ps(now), old));
            }
        }
        write(panel.of_group(group), int(row), all, own, 1);
    }
}

class Attention final : public ggml::cpu::tensor_traits {
    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        size = Work(const_cast<ggml_tensor *>(op), n_threads).bytes(n_threads);
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        const Work work(op, params->nth);
        auto       base = (reinterpret_cast<uintptr_t>(params->wdata) + 63) & ~uintptr_t(63);
        auto *     all  = reinterpret_cast<float *>(base);
        float *    own  = all + size_t(params->ith) * work.own_size();
        float *    rest = all + size_t(params->nth) * work.own_size();
        if (params->ith == 0) {
            ggml_threadpool_chunk_set(params->threadpool, params->nth);
        }
        ggml_barrier(params->threadpool);
        const auto piece  = [&](int64_t i) { return Panel(work, i / work.n_parts, i % work.n_parts, own); };
        int64_t    called = -1;
        for (int64_t i = params->ith; i < work.n_pieces(); i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
            if (work.is_narrow()) {
                // Threads take turns, so this is most likely what comes next.
                const int64_t next   = i + params->nth;
                const Block   coming = next < work.n_pieces() ? piece(next).block(piece(next).from) : Block();
                attend_narrow(piece(i), rest + size_t(i) * work.part_size(), i == called, coming);
                called = piece(i).calls_ahead() ? next : -1;
            } else {
                // The last tokens of a prompt see the most: they come first, so that nobody waits for them.
                WidePanel(Panel(work, work.n_places() - 1 - i, 0, own)).attend();
            }
        }
        if (work.is_narrow()) {
            ggml_barrier(params->threadpool);
            for (int64_t place = params->ith; place < work.n_places(); place += params->nth) {
                join(work, place, rest + size_t(place * work.n_parts) * work.part_size(), own);
            }
        }
        return true;
    }
};

}  // namespace

ggml::cpu::tensor_traits * flash_attention(const ggml_tensor * op) {
    static Attention attention;
    if (op->op != GGML_OP_FLASH_ATTN_EXT) {
        return nullptr;
    }
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    float              cap;
    memcpy(&cap, op->op_params + 2, sizeof(float));
    const bool is_usual = q->type == GGML_TYPE_F32 && k->type == GGML_TYPE_F16 && v->type == GGML_TYPE_F16 &&
                          q->nb[0] == sizeof(float) && k->nb[0] == sizeof(Half) && v->nb[0] == sizeof(Half) &&
                          k->ne[0] == v->ne[0] && k->ne[1] == v->ne[1] && k->ne[2] == v->ne[2] &&
                          q->ne[2] % k->ne[2] == 0 && q->ne[3] == k->ne[3] && q->ne[3] == v->ne[3] &&
                          cap == 0 && has_kernel(q->ne[0]);
    const bool fits = !mask || (mask->type == GGML_TYPE_F16 && mask->nb[0] == sizeof(Half) && mask->ne[2] == 1 &&
                                mask->ne[0] >= k->ne[1] && mask->ne[1] >= q->ne[1]);
    return is_usual && fits ? &attention : nullptr;
}

#else

ggml::cpu::tensor_traits * flash_attention(const ggml_tensor *) { return nullptr; }

#endif
