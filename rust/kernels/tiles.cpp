// Matrix products for processors with AVX512_VNNI, with weights laid out anew for them.
//
// This file is compiled into each of ggml's CPU modules (rust/cmake/llama.cmake) and adds one more kind of
// buffer to those in which a module lays weights out anew, ahead of its own. ggml's have dot products
// in view, or four rows of input; here every 4-byte lane of a register belongs to another row of
// weights, so that sums never cross lanes, and weights are unpacked once for up to sixteen rows of
// input, whatever their number. See docs/performance.md, "Kernels of our own", for what it gives.
//
// Weights: sixteen rows of the matrix make a tile. A tile is a sequence of units (64 or 256 values of
// each of its rows), and a unit has pieces of 32 values: eight registers, in which lane `c` holds four
// consecutive values of row `c`, as unsigned bytes above a zero point.
//
// Input: up to sixteen rows make a panel. It is rounded to 8 bits in pieces of 32 values, as ggml does it.
#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && !defined(__AMX_INT8__)

#include "formats.h"

#include <immintrin.h>
#if defined(__linux__)
#    include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <thread>
#include <utility>
#include <vector>

namespace {

constexpr int ROWS = 16;  // of weights in a tile, of input in a panel

// A piece of one row of input.
struct Piece {
    int8_t values[PIECE];
    float  scale;
    union {
        int32_t start[2];  // what sums of products begin with, so that the zero point is taken off
        float   sum;       // of the input's values, for weights with a minimum
    };
};

// Rounds a piece of input to 8 bits. What is not finite makes its scale so, and thereby the product.
template <class W> void round_piece(const float * from, Piece & to) {
    const __m512i no_sign = _mm512_set1_epi32(0x7fffffff);
    const __m512  first = _mm512_loadu_ps(from), second = _mm512_loadu_ps(from + 16);
    // As integers, so that NaN is larger than everything.
    const __m512i largest = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(first), no_sign),
                                             _mm512_and_si512(_mm512_castps_si512(second), no_sign));
    const int32_t bits    = _mm512_reduce_max_epi32(largest);
    float         most;
    memcpy(&most, &bits, 4);
    to.scale             = most / 127;
    const __m512  factor = _mm512_set1_ps(most > 1e-30f ? 127 / most : 0);
    const __m512i a      = _mm512_cvtps_epi32(_mm512_mul_ps(first, factor));
    const __m512i b      = _mm512_cvtps_epi32(_mm512_mul_ps(second, factor));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to.values), _mm512_cvtsepi32_epi8(a));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to.values + 16), _mm512_cvtsepi32_epi8(b));
    if constexpr (W::HALVES) {
        to.start[0] = -W::ZERO * _mm512_reduce_add_epi32(a);
        to.start[1] = -W::ZERO * _mm512_reduce_add_epi32(b);
    } else {
        const int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
        if constexpr (W::HAS_MINIMUM) {
            to.sum = to.scale * float(sum);
        } else {
            to.start[0] = -W::ZERO * sum;
        }
    }
}

template <int FROM, int TO> inline __m512i add_products(__m512i sum, const Registers w, const int8_t * values) {
    for (int i = FROM; i < TO; ++i) {
        int32_t four;
        memcpy(&four, values + 4 * i, 4);
        sum = _mm512_dpbusd_epi32(sum, w[i], _mm512_set1_epi32(four));
    }
    return sum;
}

// Where weights come from memory, few rows of input wait for it; what lies so many bytes further on is called for
// meanwhile. Many rows compute for longer than that takes, and all but the first sixteen find them in the cache.
constexpr int     AHEAD = 4096;
constexpr int64_t MANY  = 64;

// The products of a tile with `R` rows of input; of each row, sixteen numbers.
template <class W, int R>
void multiply_tile(const uint8_t * weights, bool call_ahead, int64_t n_units, const Piece * input,
                   float * const * output) {
    __m512 sums[R];
    for (int r = 0; r < R; ++r) {
        sums[r] = _mm512_setzero_ps();
    }
    for (int64_t unit = 0; unit < n_units; ++unit, weights += W::BYTES) {
        if (call_ahead) {
            for (int line = 0; line < W::BYTES; line += 64) {
                _mm_prefetch(reinterpret_cast<const char *>(weights) + AHEAD + line, _MM_HINT_T1);
            }
        }
        for (int piece = 0; piece < W::PIECES; ++piece, input += R) {
            Registers w;
            W::unpack(weights, piece, w);
            const __m512 scale = W::scale(weights, piece, 0);
            __m512       other = scale;  // of the second half, or the minimum
            if constexpr (W::HALVES) {
                other = W::scale(weights, piece, 1);
            } else if constexpr (W::HAS_MINIMUM) {
                other = W::minimum(weights, piece);
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const Piece & x       = input[r];
                const __m512  x_scale = _mm512_set1_ps(x.scale);
                __m512i       sum = W::HAS_MINIMUM ? _mm512_setzero_si512() : _mm512_set1_epi32(x.start[0]);
                sum = add_products<0, W::HALVES ? 4 : 8>(sum, w, x.values);
                sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, x_scale), sums[r]);
                if constexpr (W::HALVES) {
                    sum     = add_products<4, 8>(_mm512_set1_epi32(x.start[1]), w, x.values);
                    sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(other, x_scale), sums[r]);
                } else if constexpr (W::HAS_MINIMUM) {
                    sums[r] = _mm512_fnmadd_ps(other, _mm512_set1_ps(x.sum), sums[r]);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        _mm512_storeu_ps(output[r], sums[r]);
    }
}

using MultiplyTile = void (*)(const uint8_t *, bool, int64_t, const Piece *, float * const *);

template <class W, int... R> MultiplyTile for_rows(int n, std::integer_sequence<int, R...>) {
    static constexpr MultiplyTile all[] = {multiply_tile<W, R + 1>...};
    return all[n - 1];
}

// Which rows of input meet which matrix, and where the rounded input lies. With one matrix that is all of
// them, as they come; with experts (GGML_OP_MUL_MAT_ID), each row names one for each of its outputs.
struct Plan {
    ggml_tensor * op;
    int64_t       n_pieces;  // of a row
    int64_t       n_rows;
    int64_t       n_matrices;
    Piece *       input;   // in the order of panels
    int32_t *     order;   // with experts: the outputs, by expert
    int32_t *     begins;  // of each expert's, and where the last one's end
    int32_t *     experts;  // that have any, after their number

    Plan(const ggml_tensor * op_, void * work)
        : op(const_cast<ggml_tensor *>(op_)), n_pieces(op->src[0]->ne[0] / PIECE),
          n_rows(has_experts() ? ggml_nelements(op->src[2]) : ggml_nrows(op->src[1])),
          n_matrices(has_experts() ? op->src[0]->ne[2] : 1), input(static_cast<Piece *>(work)),
          order(reinterpret_cast<int32_t *>(input + n_rows * n_pieces)), begins(order + n_rows),
          experts(begins + n_matrices + 1) {}

    bool   has_experts() const { return op->op == GGML_OP_MUL_MAT_ID; }
    size_t bytes() const {
        const size_t lists = has_experts() ? size_t(n_rows + 2 * n_matrices + 2) * sizeof(int32_t) : 0;
        return size_t(n_rows * n_pieces) * sizeof(Piece) + lists;
    }

    void sort_by_expert() {
        std::fill(begins, begins + n_matrices + 1, 0);
        for (int64_t row = 0; row < n_rows; ++row) {
            ++begins[expert(row) + 1];
        }
        experts[0] = 0;
        for (int64_t i = 0; i < n_matrices; ++i) {
            if (begins[i + 1]) {
                experts[++experts[0]] = int32_t(i);
            }
            begins[i + 1] += begins[i];
        }
        for (int64_t row = 0; row < n_rows; ++row) {
            order[begins[expert(row)]++] = int32_t(row);
        }
        std::copy_backward(begins, begins + n_matrices, begins + n_matrices + 1);
        begins[0] = 0;
    }

    int64_t count(int64_t matrix) const { return has_experts() ? begins[matrix + 1] - begins[matrix] : n_rows; }
    int64_t n_used() const { return has_experts() ? experts[0] : 1; }
    int64_t used(int64_t i) const { return has_experts() ? experts[1 + i] : 0; }

    // Panels of about the same height: seventeen rows are nine and eight, not sixteen and one.
    template <class F> void for_each_panel(int64_t matrix, F && f) const {
        const int64_t first    = has_experts() ? begins[matrix] : 0;
        const int64_t n_rows   = count(matrix);
        const int64_t n_panels = (n_rows + ROWS - 1) / ROWS;
        for (int64_t panel = 0; panel < n_panels; ++panel) {
            const int64_t begin = n_rows * panel / n_panels;
            f(first + begin, int(n_rows * (panel + 1) / n_panels - begin));
        }
    }

    const float * input_row(int64_t i) const {
        if (!has_experts()) {
            return at(op->src[1], i);
        }
        const int64_t output = order[i], n_outputs = op->src[2]->ne[0], n_inputs = op->src[1]->ne[1];
        return at(op->src[1], output / n_outputs * n_inputs + output % n_outputs % n_inputs);
    }
    float * output_row(int64_t i) const { return at(op, has_experts() ? order[i] : i); }

  private:
    int32_t expert(int64_t output) const {
        const ggml_tensor * ids = op->src[2];
        const auto *        row = static_cast<const uint8_t *>(ids->data) + output / ids->ne[0] * ids->nb[1];
        int32_t             found;
        memcpy(&found, row + output % ids->ne[0] * ids->nb[0], 4);
        GGML_ASSERT(found >= 0 && found < n_matrices);
        return found;
    }

    static float * at(const ggml_tensor * tensor, int64_t row) {
        const int64_t i1 = row % tensor->ne[1], i2 = row / tensor->ne[1] % tensor->ne[2];
        const int64_t i3   = row / (tensor->ne[1] * tensor->ne[2]);
        auto *        data = static_cast<uint8_t *>(tensor->data);
        return reinterpret_cast<float *>(data + i1 * tensor->nb[1] + i2 * tensor->nb[2] + i3 * tensor->nb[3]);
    }
};

// Does what takes so many bytes in several threads, as far as there are any to be had.
template <class F> void in_parts(int64_t count, size_t bytes, const F & f) {
    constexpr size_t WORTH_A_THREAD = 4 << 20;
    const auto       cores          = int64_t(std::min(8u, std::thread::hardware_concurrency()));
    const int64_t    n              = std::clamp<int64_t>(int64_t(bytes / WORTH_A_THREAD), 1, std::max<int64_t>(1, cores));
    std::vector<std::thread> others;
    int64_t                  done = 0;
    try {
        others.reserve(size_t(n));
        for (; done < n - 1; ++done) {
            others.emplace_back(f, count * done / n, count * (done + 1) / n);
        }
    } catch (const std::exception &) {  // the rest is done here
    }
    f(count * done / n, count);
    for (std::thread & other : others) {
        other.join();
    }
}

class Layout : public ggml::cpu::tensor_traits {
  public:
    virtual bool   fits(const ggml_tensor * weights) const                 = 0;
    virtual size_t size(const ggml_tensor * weights) const                 = 0;
    virtual void   pack(ggml_tensor * weights, const uint8_t * from) const = 0;
};

template <class W> class LayoutOf final : public Layout {
    static constexpr int64_t UNIT = W::PIECES * PIECE;

  public:
    bool fits(const ggml_tensor * weights) const override {
        return weights->ne[0] % UNIT == 0 && weights->ne[1] % ROWS == 0 && weights->ne[3] == 1;
    }

    size_t size(const ggml_tensor * weights) const override {
        return size_t(weights->ne[2]) * matrix_bytes(weights);
    }

    void pack(ggml_tensor * weights, const uint8_t * from) const override {
        in_parts(weights->ne[1] * weights->ne[2] / ROWS, size(weights), [=](int64_t begin, int64_t end) {
            const size_t row_bytes = ggml_row_size(weights->type, weights->ne[0]);
            auto *       to        = static_cast<uint8_t *>(weights->data) + size_t(begin) * tile_bytes(weights);
            for (int64_t tile = begin; tile < end; ++tile) {
                for (int64_t unit = 0; unit < weights->ne[0] / UNIT; ++unit, to += W::BYTES) {
                    for (int row = 0; row < ROWS; ++row) {
                        const uint8_t * at = from + size_t(tile * ROWS + row) * row_bytes;
                        W::pack(reinterpret_cast<const typename W::Block *>(at) + unit * W::BLOCKS, to, row);
                    }
                }
            }
        });
    }

    bool work_size(int, const ggml_tensor * op, size_t & size) override {
        const Plan plan(op, nullptr);
        size = plan.bytes();
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        Plan plan(op, params->wdata);
        if (plan.has_experts()) {
            if (params->ith == 0) {
                plan.sort_by_expert();
            }
            ggml_barrier(params->threadpool);
        }
        round_input(plan, params->ith, params->nth);
        if (params->ith == 0) {
            ggml_threadpool_chunk_set(params->threadpool, params->nth);
        }
        ggml_barrier(params->threadpool);

        // As many tiles at a time as stay in a core's cache while all panels pass by; and few enough
        // that a thread which is kept from its core does not keep the others for long.
        constexpr size_t CACHED   = 256 << 10;
        const int64_t    n_tiles  = op->src[0]->ne[1] / ROWS;
        const int64_t    cached   = std::max<int64_t>(1, int64_t(CACHED / tile_bytes(op->src[0])));
        const int64_t    shared   = std::max<int64_t>(1, n_tiles / (4 * params->nth));
        const int64_t    step     = std::min(cached, shared);
        const int64_t    n_chunks = (n_tiles + step - 1) / step;
        for (int64_t chunk = params->ith; chunk < n_chunks * plan.n_used();
             chunk         = ggml_threadpool_chunk_add(params->threadpool, 1)) {
            const int64_t tile       = chunk % n_chunks * step;
            const int64_t matrix     = plan.used(chunk / n_chunks);
            bool          call_ahead = plan.count(matrix) < MANY;
            plan.for_each_panel(matrix, [&](int64_t begin, int height) {
                multiply(plan, matrix, call_ahead, begin, height, tile, std::min(n_tiles, tile + step));
                call_ahead = false;
            });
        }
        return true;
    }

  private:
    static size_t tile_bytes(const ggml_tensor * weights) { return size_t(weights->ne[0] / UNIT * W::BYTES); }
    static size_t matrix_bytes(const ggml_tensor * weights) {
        return size_t(weights->ne[1] / ROWS) * tile_bytes(weights);
    }

    // Each thread rounds a part of each row, so that a single row is everybody's work too.
    static void round_input(const Plan & plan, int64_t thread, int64_t n_threads) {
        const int64_t from = plan.n_pieces * thread / n_threads, to = plan.n_pieces * (thread + 1) / n_threads;
        for (int64_t used = 0; used < plan.n_used(); ++used) {
            plan.for_each_panel(plan.used(used), [&](int64_t begin, int height) {
                Piece * panel = plan.input + begin * plan.n_pieces;
                for (int row = 0; row < height; ++row) {
                    const float * values = plan.input_row(begin + row);
                    for (int64_t piece = from; piece < to; ++piece) {
                        round_piece<W>(values + piece * PIECE, panel[piece * height + row]);
                    }
                }
            });
        }
    }

    static void multiply(const Plan & plan, int64_t matrix, bool call_ahead, int64_t begin, int height, int64_t tile,
                         int64_t end) {
        float * output[ROWS];
        for (int row = 0; row < height; ++row) {
            output[row] = plan.output_row(begin + row) + tile * ROWS;
        }
        const ggml_tensor * weights  = plan.op->src[0];
        const size_t        bytes    = tile_bytes(weights);
        const MultiplyTile  multiply = for_rows<W>(height, std::make_integer_sequence<int, ROWS>());
        const auto * at = static_cast<const uint8_t *>(weights->data) + matrix_bytes(weights) * size_t(matrix);
        for (at += bytes * size_t(tile); tile < end; ++tile, at += bytes) {
            multiply(at, call_ahead, weights->ne[0] / UNIT, plan.input + begin * plan.n_pieces, output);
            for (int row = 0; row < height; ++row) {
                output[row] += ROWS;
            }
        }
    }
};

// None for weights that stay as they are.
Layout * layout_for(const ggml_tensor * weights) {
    static LayoutOf<Q4_0> q4_0;
    static LayoutOf<Q5_0> q5_0;
    static LayoutOf<Q8_0> q8_0;
    static LayoutOf<Q4_K> q4_k;
    static LayoutOf<Q5_K> q5_k;
    static LayoutOf<Q6_K> q6_k;
    Layout *              layout = nullptr;
    switch (weights->type) {
        case GGML_TYPE_Q4_0: layout = &q4_0; break;
        case GGML_TYPE_Q5_0: layout = &q5_0; break;
        case GGML_TYPE_Q8_0: layout = &q8_0; break;
        case GGML_TYPE_Q4_K: layout = &q4_k; break;
        case GGML_TYPE_Q5_K: layout = &q5_k; break;
        case GGML_TYPE_Q6_K: layout = &q6_k; break;
        default: break;
    }
    return layout && layout->fits(weights) ? layout : nullptr;
}

ggml_backend_buffer_type_t tiles_buffer_type();

bool is_ours(const ggml_tensor * op) {
    const ggml_tensor * weights = op->src[0];
    return (op->op == GGML_OP_MUL_MAT_ID || (op->op == GGML_OP_MUL_MAT && weights->ne[2] == 1)) &&
           weights->buffer && weights->buffer->buft == tiles_buffer_type();
}

class Tiles final : public ggml::cpu::extra_buffer_type {
    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        if (!is_ours(op) || !layout_for(op->src[0])) {
            return false;
        }
        const ggml_tensor * input = op->src[1];
        return input->type == GGML_TYPE_F32 && input->nb[0] == sizeof(float) &&
               (!input->buffer || ggml_backend_buft_is_host(input->buffer->buft));
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        return is_ours(op) ? static_cast<Layout *>(op->src[0]->extra) : flash_attention(op);
    }
};

ggml_status init_tensor(ggml_backend_buffer_t, ggml_tensor * weights) {
    weights->extra = layout_for(weights);
    return GGML_STATUS_SUCCESS;
}

void set_tensor(ggml_backend_buffer_t, ggml_tensor * weights, const void * data, size_t offset, size_t size) {
    GGML_ASSERT(offset == 0 && size == ggml_nbytes(weights));
    const auto * layout = static_cast<const Layout *>(weights->extra);
    if (layout) {
        layout->pack(weights, static_cast<const uint8_t *>(data));
    } else {
        memcpy(weights->data, data, size);
    }
}

const char * name(ggml_backend_buffer_type_t) { return "CPU_TILES"; }

// All weights are read for every token, and small pages cost a look into the page table each.
void ask_for_large_pages(void * base, size_t size) {
#if defined(__linux__)
    constexpr uintptr_t PAGE  = 4096;
    const uintptr_t     begin = (reinterpret_cast<uintptr_t>(base) + PAGE - 1) / PAGE * PAGE;
    const uintptr_t     end   = (reinterpret_cast<uintptr_t>(base) + size) / PAGE * PAGE;
    if (begin < end) {
        madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);  // a wish: no matter if not
    }
#else
    (void) base, (void) size;
#endif
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer) {
        ask_for_large_pages(ggml_backend_buffer_get_base(buffer), size);
        buffer->buft              = type;
        buffer->iface.init_tensor = init_tensor;
        buffer->iface.set_tensor  = set_tensor;
        buffer->iface.get_tensor  = nullptr;
        buffer->iface.cpy_tensor  = nullptr;
    }
    return buffer;
}

size_t alignment(ggml_backend_buffer_type_t) { return 64; }

size_t alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * weights) {
    const Layout * layout = layout_for(weights);
    return layout ? layout->size(weights) : ggml_nbytes(weights);
}

ggml_backend_buffer_type_t tiles_buffer_type() {
    static Tiles                    tiles;
    static ggml_backend_buffer_type type = [] {
        ggml_backend_buffer_type type{};
        type.iface.get_name       = name;
        type.iface.alloc_buffer   = alloc_buffer;
        type.iface.get_alignment  = alignment;
        type.iface.get_alloc_size = alloc_size;
        type.device               = ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
        type.context              = &tiles;
        return type;
    }();
    return &type;
}

}  // namespace

// To be called once, after the module was loaded and before anybody asks it for its kinds of buffers.
extern "C" {
GGML_BACKEND_API void tabagent_add_kernels();
}

void tabagent_add_kernels() {
    auto & types = ggml_backend_cpu_get_extra_buffer_types();
    if (types.empty() || types.front() != tiles_buffer_type()) {
        types.insert(types.begin(), tiles_buffer_type());
    }
}

#endif
