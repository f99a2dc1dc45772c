// Times products with weights as they lie in a file, and as the CPU module lays them out anew.
#include "stopwatch.h"

#include <algorithm>
#include <array>
#include <vector>

namespace {

// Multiples of all blocks and tiles. Real matrices are larger, and no faster.
constexpr int64_t COLUMNS = 2048;
constexpr int64_t ROWS    = 1024;

// So many alike that each has left the caches when its turn comes again.
struct Matrices {
    Owned<ggml_context>        context;
    Owned<ggml_backend_buffer> buffer;
    ggml_tensor *              next = nullptr;

    int lay_out(ggml_type type, size_t bytes, ggml_backend_buffer_type_t buffer_type, ta_error * error) {
        const size_t each = ggml_row_size(type, COLUMNS) * ROWS, count = std::max<size_t>(LAYERS_OF_ONE_ROW, bytes / each);
        context.reset(ggml_init({ggml_tensor_overhead() * count, nullptr, true}));
        for (size_t i = 0; i < count; ++i) {
            ggml_new_tensor_2d(context.get(), type, COLUMNS, ROWS);
        }
        buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(context.get(), buffer_type));
        if (!buffer) {
            return ta_fail(error, TA_NO_MEMORY, "");
        }
        ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        const std::vector<uint8_t> weights(each, BYTE_OF_ALL_NUMBERS);
        for (ggml_tensor * w = first(); w; w = ggml_get_next_tensor(context.get(), w)) {
            ggml_backend_tensor_set(w, weights.data(), 0, each);
        }
        next = first();
        return TA_OK;
    }

    ggml_tensor * first() const { return ggml_get_first_tensor(context.get()); }

    ggml_tensor * take() {
        ggml_tensor * taken = next;
        next = ggml_get_next_tensor(context.get(), taken);
        next = next ? next : first();
        return taken;
    }
};

}  // namespace

struct ta_layouts {
    Stopwatch                            stopwatch;
    std::vector<std::array<Matrices, 2>> types;  // as in a file, and anew
};

int ta_layouts_new(const int32_t * types, int32_t n_types, int32_t n_threads, ta_layouts ** out,
                   ta_error * error) noexcept {
    return ta_guard(error, [&] {
        auto layouts = std::make_unique<ta_layouts>();
        if (const int status = layouts->stopwatch.start(n_threads, error)) {
            return status;
        }
        ggml_backend_t     backend = layouts->stopwatch.backend.get();
        ggml_backend_dev_t device  = ggml_backend_get_device(backend);
        const size_t       share   = RING_BYTES / 2 / size_t(std::max(1, n_types));
        layouts->types.resize(n_types);
        for (int32_t place = 0; place < n_types; ++place) {
            const auto          type = ggml_type(types[place]);
            Owned<ggml_context> context(ggml_init({ggml_tensor_overhead(), nullptr, true}));
            auto anew = relaid_buffer_type(device, ggml_new_tensor_2d(context.get(), type, COLUMNS, ROWS));
            if (!anew) {
                return ta_fail(error, TA_REFUSED, "weights of such a type have no other layout");
            }
            auto as_in_file = ggml_backend_get_default_buffer_type(backend);
            for (bool is_anew : {false, true}) {
                Matrices & matrices = layouts->types[place][is_anew];
                if (const int status = matrices.lay_out(type, share, is_anew ? anew : as_in_file, error)) {
                    return status;
                }
            }
        }
        *out = layouts.release();
        return int(TA_OK);
    });
}

void ta_layouts_free(ta_layouts * layouts) noexcept {
    ta_guard(nullptr, [&] {
        delete layouts;
        return int(TA_OK);
    });
}

int ta_layouts_time(ta_layouts * layouts, int32_t place, bool anew, int32_t rows, double * seconds,
                    ta_error * error) noexcept {
    return ta_guard(error, [&] {
        const int count = rows == 1 ? LAYERS_OF_ONE_ROW : 1;
        Owned<ggml_context> context(ggml_init(
            {ggml_tensor_overhead() * size_t(1 + count) + ggml_graph_overhead(), nullptr, true}));
        ggml_cgraph * graph = ggml_new_graph(context.get());
        ggml_tensor * x     = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, COLUMNS, rows);
        ggml_set_input(x);
        size_t bytes = 0;
        for (int i = 0; i < count; ++i) {
            ggml_tensor * w = layouts->types[place][anew].take();
            ggml_build_forward_expand(graph, ggml_mul_mat(context.get(), w, x));
            bytes += ggml_nbytes(w);
        }
        const int status = layouts->stopwatch.time(graph, seconds, error, [&] {
            ggml_backend_tensor_memset(x, BYTE_OF_ALL_NUMBERS, 0, ggml_nbytes(x));
        });
        *seconds /= double(bytes);
        return status;
    });
}
