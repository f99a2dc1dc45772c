// Proves a backend: a small matrix product of each weight type, in each kind of buffer.
//
// Some compilers build modules that die at the first prompt, and some virtual machines announce
// instructions that they do not run; a GPU may be older than all that its backend was compiled for. A child
// process that survives this has run the kernels.
#include "cpu.h"
#include "guard.h"

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int64_t COLUMNS = 256;  // a multiple of every block size
constexpr int64_t ROWS    = 64;   // enough for the tiled and repacked kernels

float weight(int64_t i) { return std::sin(0.37f * float(i)) * 0.5f; }

// y = W·x for `batch` columns of x; compares with the product in double precision.
void multiply(ggml_backend_t backend, ggml_backend_buffer_type_t buffer_type, ggml_type type,
              int64_t batch) {
    Owned<ggml_context> weights(ggml_init({ggml_tensor_overhead(), nullptr, true}));
    ggml_tensor * w = ggml_new_tensor_2d(weights.get(), type, COLUMNS, ROWS);

    Owned<ggml_context> graph_context(
        ggml_init({ggml_tensor_overhead() * 8 + ggml_graph_overhead(), nullptr, true}));
    ggml_tensor * x = ggml_new_tensor_2d(graph_context.get(), GGML_TYPE_F32, COLUMNS, batch);
    ggml_set_input(x);
    ggml_tensor * y = ggml_mul_mat(graph_context.get(), w, x);
    ggml_set_output(y);
    ggml_cgraph * graph = ggml_new_graph(graph_context.get());
    ggml_build_forward_expand(graph, y);

    Owned<ggml_backend_buffer> buffer(ggml_backend_alloc_ctx_tensors_from_buft(weights.get(), buffer_type));
    if (!buffer) {
        throw std::runtime_error("no memory for the probe");
    }
    ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    if (!ggml_backend_dev_supports_op(ggml_backend_get_device(backend), y)) {
        return;  // this kind of buffer does not take this type
    }

    std::vector<float> plain(COLUMNS * ROWS), input(COLUMNS * batch), output(ROWS * batch);
    for (size_t i = 0; i < plain.size(); ++i) plain[i] = weight(int64_t(i));
    for (size_t i = 0; i < input.size(); ++i) input[i] = weight(int64_t(i) + 11);
    std::vector<uint8_t> packed(ggml_row_size(type, COLUMNS) * ROWS);
    ggml_quantize_chunk(type, plain.data(), packed.data(), 0, ROWS, COLUMNS, nullptr);
    ggml_backend_tensor_set(w, packed.data(), 0, packed.size());

    Owned<ggml_gallocr> allocator(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
    if (!ggml_gallocr_alloc_graph(allocator.get(), graph)) {
        throw std::runtime_error("no memory for the probe");
    }
    ggml_backend_tensor_set(x, input.data(), 0, input.size() * sizeof(float));
    if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("the product could not be computed");
    }
    ggml_backend_tensor_get(y, output.data(), 0, output.size() * sizeof(float));

    for (int64_t column = 0; column < batch; ++column) {
        for (int64_t row = 0; row < ROWS; ++row) {
            double exact = 0;
            for (int64_t k = 0; k < COLUMNS; ++k) {
                exact += double(plain[row * COLUMNS + k]) * input[column * COLUMNS + k];
            }
            const float got = output[column * ROWS + row];
            if (!(std::fabs(got - exact) < 2.0)) {  // 4-bit weights are off by a few tenths
                throw std::runtime_error(std::string("a wrong product with ") + ggml_type_name(type) +
                                         " weights: " + std::to_string(got) + " instead of " +
                                         std::to_string(exact));
            }
        }
    }
}

// The kinds of buffers with a layout of their own, in the order in which llama.cpp tries them.
std::vector<ggml_backend_buffer_type_t> extra_buffer_types(ggml_backend_dev_t device) {
    std::vector<ggml_backend_buffer_type_t> found;
    auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
    for (auto * type = extra ? extra(device) : nullptr; type && *type; ++type) {
        found.push_back(*type);
    }
    return found;
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
            multiply(backend.get(), buffer_type, type, 1);
            multiply(backend.get(), buffer_type, type, 32);
        }
    }
}

// Whether the device multiplies with a matrix of this type in such a buffer, and how large it is there.
double relaid_in(ggml_backend_dev_t device, ggml_backend_buffer_type_t buffer_type, ggml_type type) {
    Owned<ggml_context>        context(ggml_init({ggml_tensor_overhead() * 3, nullptr, true}));
    Owned<ggml_backend_buffer> empty(ggml_backend_buft_alloc_buffer(buffer_type, 0));
    ggml_tensor * w = ggml_new_tensor_2d(context.get(), type, COLUMNS, ROWS);
    ggml_tensor * x = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, COLUMNS, 32);
    ggml_tensor * y = ggml_mul_mat(context.get(), w, x);
    w->buffer       = empty.get();
    if (!ggml_backend_dev_supports_op(device, y)) {
        return 0;
    }
    return double(ggml_backend_buft_get_alloc_size(buffer_type, w)) / double(ggml_nbytes(w));
}

}  // namespace

int ta_relaid(int32_t type, double * factor, ta_error * error) noexcept {
    return ta_guard(error, [&] {
        ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        if (!device || type < 0 || type >= GGML_TYPE_COUNT || ggml_blck_size(ggml_type(type)) == 0) {
            return ta_fail(error, TA_REFUSED, "there is no CPU device, or no such type");
        }
        *factor = 0;
        for (ggml_backend_buffer_type_t buffer_type : extra_buffer_types(device)) {
            if (*factor == 0) {
                *factor = relaid_in(device, buffer_type, ggml_type(type));
            }
        }
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
