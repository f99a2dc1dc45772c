// Proves a backend: a small matrix product of each weight type, in each kind of buffer.
//
// Some compilers build modules that die at the first prompt, and some virtual machines announce
// instructions that they do not run; a GPU may be older than all that its backend was compiled for. A child
// process that survives this has run the kernels.
#include "cpu.h"
#include "guard.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int64_t COLUMNS = 256;  // a multiple of every block size
constexpr int64_t ROWS    = 64;   // enough for the tiled and repacked kernels

float weight(int64_t i) { return std::sin(0.37f * float(i)) * 0.5f; }

// A whole number, and in each 32 of them the largest, so that rounding to 8 bits changes nothing.
float input(int64_t i) { return i % 32 == 5 ? 127.0f : std::round(std::sin(0.71f * float(i)) * 126.0f); }

// y = W·x for `batch` columns of x. What is found: how far it is from the product of the same weights in
// double precision, as a part of its largest number; and the least time that it took.
bool multiply(ggml_backend_t backend, ggml_backend_buffer_type_t buffer_type, ggml_type type,
              const ta_product & asked, ta_product_found & found) {
    const int64_t columns = asked.columns, rows = asked.rows, batch = asked.batch;
    const int64_t experts = std::max<int64_t>(1, asked.experts), used = asked.experts ? 2 : 1;

    Owned<ggml_context> weights(ggml_init({ggml_tensor_overhead(), nullptr, true}));
    ggml_tensor * w = ggml_new_tensor_3d(weights.get(), type, columns, rows, experts);

    Owned<ggml_context> graph_context(
        ggml_init({ggml_tensor_overhead() * 8 + ggml_graph_overhead(), nullptr, true}));
    ggml_tensor * x = ggml_new_tensor_3d(graph_context.get(), GGML_TYPE_F32, columns, 1, batch);
    ggml_tensor * ids = ggml_new_tensor_2d(graph_context.get(), GGML_TYPE_I32, used, batch);
    ggml_set_input(x);
    ggml_set_input(ids);
    ggml_tensor * y = asked.experts ? ggml_mul_mat_id(graph_context.get(), w, x, ids)
                                    : ggml_mul_mat(graph_context.get(), w, ggml_reshape_2d(graph_context.get(), x, columns, batch));
    ggml_set_output(y);
    ggml_cgraph * graph = ggml_new_graph(graph_context.get());
    ggml_build_forward_expand(graph, y);

    // Whether this kind of buffer takes such weights is asked before they are there, as llama.cpp does.
    Owned<ggml_backend_buffer> empty(ggml_backend_buft_alloc_buffer(buffer_type, 0));
    w->buffer          = empty.get();
    const bool is_done = ggml_backend_dev_supports_op(ggml_backend_get_device(backend), y);
    w->buffer          = nullptr;
    if (!is_done) {
        return false;
    }
    Owned<ggml_backend_buffer> buffer(ggml_backend_alloc_ctx_tensors_from_buft(weights.get(), buffer_type));
    if (!buffer) {
        throw std::runtime_error("no memory for the probe");
    }
    ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);

    std::vector<float> plain(columns * rows * experts), given(columns * batch), output(rows * used * batch);
    for (size_t i = 0; i < plain.size(); ++i) plain[i] = weight(int64_t(i));
    for (size_t i = 0; i < given.size(); ++i) given[i] = input(int64_t(i));
    std::vector<uint8_t> packed(ggml_row_size(type, columns) * rows * experts);
    ggml_quantize_chunk(type, plain.data(), packed.data(), 0, rows * experts, columns, nullptr);
    ggml_backend_tensor_set(w, packed.data(), 0, packed.size());
    if (type != GGML_TYPE_F32) {
        ggml_get_type_traits(type)->to_float(packed.data(), plain.data(), columns * rows * experts);
    }

    Owned<ggml_gallocr> allocator(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
    if (!ggml_gallocr_alloc_graph(allocator.get(), graph)) {
        throw std::runtime_error("no memory for the probe");
    }
    ggml_backend_tensor_set(x, given.data(), 0, given.size() * sizeof(float));
    std::vector<int32_t> chosen(used * batch);  // two different ones of each row, and some more often
    for (size_t i = 0; i < chosen.size(); ++i) chosen[i] = int32_t((i / 2 * (i / 2) + i % 2) % experts);
    if (asked.experts) {
        ggml_backend_tensor_set(ids, chosen.data(), 0, chosen.size() * sizeof(int32_t));
    }
    found.seconds = INFINITY;
    for (int32_t i = 0; i < asked.times; ++i) {
        const auto begun = std::chrono::steady_clock::now();
        if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
            throw std::runtime_error("the product could not be computed");
        }
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begun;
        found.seconds = std::min(found.seconds, taken.count());
    }
    ggml_backend_tensor_get(y, output.data(), 0, output.size() * sizeof(float));

    double largest = 0, furthest = 0;
    for (int64_t i = 0; i < used * batch; ++i) {
        const float * in  = given.data() + i / used * columns;
        const float * row = plain.data() + (asked.experts ? chosen[i] : 0) * rows * columns;
        for (int64_t j = 0; j < rows; ++j, row += columns) {
            double exact = 0;
            for (int64_t k = 0; k < columns; ++k) {
                exact += double(row[k]) * in[k];
            }
            const double off = std::fabs(output[i * rows + j] - exact);
            largest          = std::max(largest, std::fabs(exact));
            furthest         = off <= furthest ? furthest : off;  // and what is not a number, too
        }
    }
    found.error = furthest / largest;
    return true;
}

// Multiplies on a device with each type of weights, one column at a time and many.
void prove(ggml_backend_dev_t device) {
    Owned<ggml_backend> backend(ggml_backend_dev_init(device, nullptr));
    if (!backend) {
        throw std::runtime_error(std::string(ggml_backend_dev_name(device)) + " does not start");
    }
    std::vector<ggml_backend_buffer_type_t> buffer_types = extra_buffer_types(device);
    buffer_types.insert(buffer_types.begin(), ggml_backend_dev_buffer_type(device));
    for (ggml_backend_buffer_type_t buffer_type : buffer_types) {
        for (ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0,
                               GGML_TYPE_Q4_0, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K}) {
            for (int64_t batch : {1, 32}) {
                ta_product_found found;
                const bool is_done =
                    multiply(backend.get(), buffer_type, type, {COLUMNS, ROWS, batch, 0, 1, 1}, found);
                if (is_done && !(found.error < 0.02)) {
                    throw std::runtime_error(std::string("wrong products with ") + ggml_type_name(type) +
                                             " weights: off by " + std::to_string(found.error));
                }
            }
        }
    }
}

// What `attend` compares with: one query, one cell after the other.
std::vector<double> attend_plainly(const ta_attended & asked, const float * q, const ggml_fp16_t * k,
                                   const ggml_fp16_t * v, const ggml_fp16_t * mask, const float * sink, int head) {
    const double        scale = 1 / std::sqrt(double(asked.dim));
    const double        n     = std::exp2(std::floor(std::log2(double(asked.n_head))));
    const double        slope = asked.max_bias <= 0 ? 1
                                : head < n          ? std::exp2(-asked.max_bias / n * (head + 1))
                                                    : std::exp2(-asked.max_bias / 2 / n * (2 * (head - n) + 1));
    std::vector<double> sum(asked.dim), scores(asked.n_cells);
    double              highest = sink ? *sink : -1e300, weights = 0;
    for (int c = 0; c < asked.n_cells; ++c) {
        for (int d = 0; d < asked.dim; ++d) {
            scores[c] += q[d] * scale * ggml_fp16_to_fp32(k[int64_t(c) * asked.n_head_kv * asked.dim + d]);
        }
        scores[c] += slope * ggml_fp16_to_fp32(mask[c]);
        highest = std::max(highest, scores[c]);
    }
    for (int c = 0; c < asked.n_cells; ++c) {
        const double weight = std::exp(scores[c] - highest);
        weights += weight;
        for (int d = 0; d < asked.dim; ++d) {
            sum[d] += weight * ggml_fp16_to_fp32(v[int64_t(c) * asked.n_head_kv * asked.dim + d]);
        }
    }
    weights += sink ? std::exp(*sink - highest) : 0;
    for (double & x : sum) x = weights > 0 ? x / weights : 0;
    return sum;
}

double attend(ggml_backend_t backend, const ta_attended & asked) {
    const int64_t dim = asked.dim, heads = asked.n_head, kv_heads = asked.n_head_kv, tokens = asked.n_tokens,
                  cells = asked.n_cells, streams = asked.n_streams;
    Owned<ggml_context> owned(ggml_init({ggml_tensor_overhead() * 16 + ggml_graph_overhead(), nullptr, true}));
    ggml_context *      ctx  = owned.get();
    ggml_tensor *       q    = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, dim, heads, tokens, streams);
    ggml_tensor *       k    = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, dim, kv_heads, cells, streams);
    ggml_tensor *       v    = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, dim, kv_heads, cells, streams);
    ggml_tensor *       mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, cells, tokens, 1, streams);
    ggml_tensor *       sinks = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, heads);
    for (ggml_tensor * input : {q, k, v, mask, sinks}) ggml_set_input(input);
    ggml_tensor * y = ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), ggml_permute(ctx, k, 0, 2, 1, 3),
                                          ggml_permute(ctx, v, 0, 2, 1, 3), mask, 1 / std::sqrt(float(dim)),
                                          asked.max_bias, 0);
    if (asked.has_sinks) ggml_flash_attn_ext_add_sinks(y, sinks);
    ggml_set_output(y);
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, y);
    Owned<ggml_backend_buffer> buffer(ggml_backend_alloc_ctx_tensors(ctx, backend));
    if (!buffer) {
        throw std::runtime_error("no memory for the probe");
    }

    // Numbers that look like chance and are the same each time.
    uint32_t   state  = 1;
    const auto chance = [&state] { return float((state = state * 1664525 + 1013904223) >> 8) / float(1 << 23) - 1; };
    std::vector<float>       queries(ggml_nelements(q)), sink(heads), output(ggml_nelements(y));
    std::vector<ggml_fp16_t> keys(ggml_nelements(k)), values(ggml_nelements(v)), masks(ggml_nelements(mask));
    for (float & x : queries) x = 4 * chance();
    for (float & x : sink) x = chance();
    for (auto & x : keys) x = ggml_fp32_to_fp16(chance());
    for (auto & x : values) x = ggml_fp32_to_fp16(chance());
    for (int64_t i = 0; i < int64_t(masks.size()); ++i) {
        const int64_t cell = i % cells, token = i / cells % tokens;
        const bool    seen = asked.is_causal ? cell <= cells - tokens + token : chance() > 0 && (token > 0 || tokens == 1);
        masks[i]           = ggml_fp32_to_fp16(!seen ? -INFINITY : asked.max_bias > 0 ? float(cell - cells) : 0);
    }
    const auto set = [](ggml_tensor * tensor, const auto & from) {
        if (tensor->buffer) ggml_backend_tensor_set(tensor, from.data(), 0, ggml_nbytes(tensor));
    };
    set(q, queries), set(k, keys), set(v, values), set(mask, masks), set(sinks, sink);
    if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("attention could not be computed");
    }
    ggml_backend_tensor_get(y, output.data(), 0, ggml_nbytes(y));

    double largest = 0, furthest = 0;
    for (int64_t i = 0; i < streams * tokens * heads; ++i) {
        const int64_t head = i % heads, token = i / heads % tokens, stream = i / heads / tokens;
        const int64_t from = stream * cells * kv_heads * dim + head / (heads / kv_heads) * dim;
        const auto    exact =
            attend_plainly(asked, &queries[i * dim], &keys[from], &values[from],
                           &masks[(stream * tokens + token) * cells], asked.has_sinks ? &sink[head] : nullptr, int(head));
        for (int64_t d = 0; d < dim; ++d) {
            const double off = std::fabs(output[i * dim + d] - exact[d]);
            largest          = std::max(largest, std::fabs(exact[d]));
            furthest         = off <= furthest ? furthest : off;
        }
    }
    return furthest / largest;
}

}  // namespace

int ta_relaid(int32_t type, double * factor, ta_error * error) noexcept {
    return ta_guard(error, [&] {
        ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        if (!device || type < 0 || type >= GGML_TYPE_COUNT || ggml_blck_size(ggml_type(type)) == 0) {
            return ta_fail(error, TA_REFUSED, "there is no CPU device, or no such type");
        }
        Owned<ggml_context> context(ggml_init({ggml_tensor_overhead(), nullptr, true}));
        ggml_tensor * w           = ggml_new_tensor_2d(context.get(), ggml_type(type), COLUMNS, ROWS);
        auto          buffer_type = relaid_buffer_type(device, w);
        *factor = buffer_type ? double(ggml_backend_buft_get_alloc_size(buffer_type, w)) / double(ggml_nbytes(w)) : 0;
        return int(TA_OK);
    });
}

int ta_multiply(int32_t type, int32_t layout, const ta_product * asked, ta_product_found * found,
                ta_error * error) noexcept {
    return ta_guard(error, [&] {
        ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        std::vector<ggml_backend_buffer_type_t> buffer_types = extra_buffer_types(device);
        buffer_types.insert(buffer_types.begin(), ggml_backend_dev_buffer_type(device));
        Owned<ggml_backend> backend(ggml_backend_dev_init(device, nullptr));
        auto set_threads = cpu_function<ggml_backend_set_n_threads_t>("ggml_backend_set_n_threads");
        if (size_t(layout) >= buffer_types.size() || !backend || !set_threads) {
            return ta_fail(error, TA_REFUSED, "there is no such kind of buffer");
        }
        set_threads(backend.get(), asked->threads);
        return multiply(backend.get(), buffer_types[layout], ggml_type(type), *asked, *found) ? 1 : 0;
    });
}

int ta_attend(const ta_attended * asked, double * off, ta_error * error) noexcept {
    return ta_guard(error, [&] {
        Owned<ggml_backend> backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
        auto set_threads = cpu_function<ggml_backend_set_n_threads_t>("ggml_backend_set_n_threads");
        if (!backend || !set_threads) {
            return ta_fail(error, TA_REFUSED, "there is no CPU device");
        }
        set_threads(backend.get(), asked->threads);
        *off = attend(backend.get(), *asked);
        return int(TA_OK);
    });
}

int ta_probe_cpu(ta_error * error) noexcept {
    return ta_guard(error, [&] {
        ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        if (!device) {
            return ta_fail(error, TA_REFUSED, "the module registers no CPU device");
        }
        prove(device);
        return int(TA_OK);
    });
}

int ta_probe_gpus(ta_error * error) noexcept {
    return ta_guard(error, [&] {
        size_t found = 0;
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            ggml_backend_dev_t device = ggml_backend_dev_get(i);
            const auto         type   = ggml_backend_dev_type(device);
            if (type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU) {
                prove(device);
                ++found;
            }
        }
        return found ? int(TA_OK) : ta_fail(error, TA_REFUSED, "the backend finds no GPU here");
    });
}
