// Times the attention of one layer on the CPU: the graph that llama.cpp builds for it (build_attn in
// llama-graph.cpp, cpy_k and cpy_v in llama-kv-cache.cpp), without a model around it.
#include "stopwatch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <ctime>
#include <vector>

namespace {

constexpr size_t ALIGNMENT = 4096;

}  // namespace

struct ta_attention {
    ta_attention_shape shape;
    size_t             next = 0;

    Stopwatch                  stopwatch;
    Owned<ggml_backend_buffer> ring;

    int64_t kv_width() const { return int64_t(shape.head_dim) * shape.n_head_kv; }

    // Two-dimensional: a tensor of the cache, at the next place of the ring.
    ggml_tensor * place(ggml_context * context, ggml_type type, int64_t ne0, int64_t ne1) {
        ggml_tensor * tensor = ggml_new_tensor_2d(context, type, ne0, ne1);
        if (next + ggml_nbytes(tensor) > ggml_backend_buffer_get_size(ring.get())) {
            next = 0;
        }
        void * base = ggml_backend_buffer_get_base(ring.get());
        ggml_backend_tensor_alloc(ring.get(), tensor, static_cast<char *>(base) + next);
        next += GGML_PAD(ggml_nbytes(tensor), ALIGNMENT);
        return tensor;
    }
};

namespace {

ggml_tensor * input(ggml_context * context, ggml_type type, std::vector<int64_t> ne) {
    ggml_tensor * tensor = ggml_new_tensor(context, type, int(ne.size()), ne.data());
    ggml_set_input(tensor);
    return tensor;
}

// What a step hands to the attention of every layer.
struct Inputs {
    ggml_tensor * q;
    ggml_tensor * k;
    ggml_tensor * v;
    ggml_tensor * mask;
    ggml_tensor * k_cells;
    ggml_tensor * v_cells;

    Inputs(ggml_context * context, const ta_attention & attention, const ta_attention_case & what) {
        const ta_attention_shape & shape = attention.shape;
        const int64_t width = attention.kv_width();
        q    = input(context, GGML_TYPE_F32, {shape.head_dim, shape.n_head, what.rows});
        k    = input(context, GGML_TYPE_F32, {width, what.rows});
        v    = input(context, GGML_TYPE_F32, {width, what.rows});
        mask = input(context, what.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32, {what.n_kv, what.rows});
        k_cells = input(context, GGML_TYPE_I64, {what.rows});
        v_cells = input(context, GGML_TYPE_I64, {what.flash_attn ? what.rows : what.rows * width});
    }

    void fill(const ta_attention & attention, const ta_attention_case & what) const {
        for (ggml_tensor * tensor : {q, k, v}) {
            ggml_backend_tensor_memset(tensor, BYTE_OF_ALL_NUMBERS, 0, ggml_nbytes(tensor));
        }
        fill_mask(what);
        const int64_t first = what.n_kv - what.rows, width = attention.kv_width();
        std::vector<int64_t> cells;
        for (int64_t row = 0; row < what.rows; ++row) cells.push_back(first + row);
        ggml_backend_tensor_set(k_cells, cells.data(), 0, ggml_nbytes(k_cells));
        if (!what.flash_attn) {  // values lie transposed, and each number is a row of its own
            cells.clear();
            for (int64_t row = 0; row < what.rows; ++row) {
                for (int64_t i = 0; i < width; ++i) cells.push_back(i * attention.shape.n_ctx + first + row);
            }
        }
        ggml_backend_tensor_set(v_cells, cells.data(), 0, ggml_nbytes(v_cells));
    }

    void fill_mask(const ta_attention_case & what) const {
        std::vector<float> visible(size_t(what.n_kv) * what.rows);
        for (int64_t row = 0; row < what.rows; ++row) {
            const int64_t end = what.n_kv - what.rows + row + 1;
            std::fill(&visible[row * what.n_kv] + end, &visible[row * what.n_kv] + what.n_kv, -INFINITY);
        }
        if (mask->type == GGML_TYPE_F32) {
            ggml_backend_tensor_set(mask, visible.data(), 0, ggml_nbytes(mask));
        } else {
            std::vector<ggml_fp16_t> halves(visible.size());
            ggml_fp32_to_fp16_row(visible.data(), halves.data(), int64_t(visible.size()));
            ggml_backend_tensor_set(mask, halves.data(), 0, ggml_nbytes(mask));
        }
    }
};

void add_layer(ta_attention & attention, const ta_attention_case & what, const Inputs & in,
               ggml_context * context, ggml_cgraph * graph) {
    const ta_attention_shape & shape = attention.shape;
    const auto    type  = static_cast<ggml_type>(what.kv_type);
    const int64_t width = attention.kv_width(), dim = shape.head_dim, n_ctx = shape.n_ctx;
    const float   scale = 1.0f / std::sqrt(float(dim));
    const size_t  head  = ggml_row_size(type, dim), cell = ggml_row_size(type, width);

    ggml_tensor * keys = attention.place(context, type, width, n_ctx);
    ggml_build_forward_expand(graph, ggml_set_rows(context, keys, in.k, in.k_cells));
    ggml_tensor * k = ggml_view_3d(context, keys, dim, what.n_kv, shape.n_head_kv, cell, head, 0);
    ggml_tensor * q = ggml_permute(context, in.q, 0, 2, 1, 3);

    if (what.flash_attn) {
        ggml_tensor * values = attention.place(context, type, width, n_ctx);
        ggml_build_forward_expand(graph, ggml_set_rows(context, values, in.v, in.v_cells));
        ggml_tensor * v = ggml_view_3d(context, values, dim, what.n_kv, shape.n_head_kv, cell, head, 0);
        if (type == GGML_TYPE_F32) {  // as llama.cpp does, at every step
            k = ggml_cast(context, k, GGML_TYPE_F16);
            v = ggml_cast(context, v, GGML_TYPE_F16);
        }
        ggml_tensor * out = ggml_flash_attn_ext(context, q, k, v, in.mask, scale, 0.0f, 0.0f);
        ggml_prec_set_acc(out, GGML_PREC_F32);
        ggml_build_forward_expand(graph, out);
        return;
    }
    ggml_tensor * values  = attention.place(context, type, n_ctx, width);
    ggml_tensor * numbers = ggml_reshape_2d(context, values, 1, n_ctx * width);
    ggml_tensor * new_v   = ggml_reshape_2d(context, in.v, 1, width * what.rows);
    ggml_build_forward_expand(graph, ggml_set_rows(context, numbers, new_v, in.v_cells));
    const size_t  line = ggml_row_size(type, n_ctx);
    ggml_tensor * v = ggml_view_3d(context, values, what.n_kv, dim, shape.n_head_kv, line, line * dim, 0);

    ggml_tensor * scores = ggml_mul_mat(context, k, q);
    ggml_prec_set_acc(scores, GGML_PREC_F32);
    scores = ggml_soft_max_ext(context, scores, in.mask, scale, 0.0f);
    ggml_tensor * out = ggml_permute(context, ggml_mul_mat(context, v, scores), 0, 2, 1, 3);
    ggml_build_forward_expand(graph, ggml_cont_2d(context, out, dim * shape.n_head, what.rows));
}

}  // namespace

int ta_attention_new(const ta_attention_shape * shape, int32_t n_threads, ta_attention ** out,
                     ta_error * error) noexcept {
    return ta_guard(error, [&] {
        auto attention   = std::make_unique<ta_attention>();
        attention->shape = *shape;
        if (const int status = attention->stopwatch.start(n_threads, error)) {
            return status;
        }
        const size_t largest = size_t(attention->kv_width()) * shape->n_ctx * sizeof(float);
        ggml_backend_buffer_type_t memory = ggml_backend_get_default_buffer_type(attention->stopwatch.backend.get());
        attention->ring.reset(ggml_backend_buft_alloc_buffer(memory, std::max(RING_BYTES, 2 * largest)));
        if (!attention->ring) {
            return ta_fail(error, TA_NO_MEMORY, "");
        }
        ggml_backend_buffer_clear(attention->ring.get(), BYTE_OF_ALL_NUMBERS);
        *out = attention.release();
        return int(TA_OK);
    });
}

void ta_attention_free(ta_attention * attention) noexcept {
    ta_guard(nullptr, [&] {
        delete attention;
        return int(TA_OK);
    });
}

int ta_attention_time(ta_attention * attention, const ta_attention_case * what, double * seconds,
                      ta_error * error) noexcept {
    return ta_guard(error, [&] {
        const int layers = what->rows == 1 ? LAYERS_OF_ONE_ROW : 1;
        const size_t tensors = 8 + 24 * size_t(layers);
        Owned<ggml_context> context(ggml_init(
            {ggml_tensor_overhead() * tensors + ggml_graph_overhead(), nullptr, true}));
        ggml_cgraph * graph = ggml_new_graph(context.get());
        const Inputs in(context.get(), *attention, *what);
        for (int layer = 0; layer < layers; ++layer) {
            add_layer(*attention, *what, in, context.get(), graph);
        }
        const int status = attention->stopwatch.time(graph, seconds, error, [&] { in.fill(*attention, *what); });
        *seconds /= layers;
        return status;
    });
}

double ta_cpu_seconds(void) noexcept { return double(std::clock()) / CLOCKS_PER_SEC; }

int ta_cpu_has(const char * feature, ta_error * error) noexcept {
    return ta_guard(error, [&] {
        auto features = cpu_function<ggml_backend_get_features_t>("ggml_backend_get_features");
        auto * known  = features ? features(ggml_backend_reg_by_name("CPU")) : nullptr;
        for (; known && known->name; ++known) {
            if (std::strcmp(known->name, feature) == 0) {
                return 1;
            }
        }
        return 0;
    });
}
