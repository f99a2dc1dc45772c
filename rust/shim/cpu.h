// ggml's CPU backend, which is a module chosen at run time: its functions are found by name.
#pragma once

#include "shim.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <memory>
#include <vector>

template <class F>
F cpu_function(const char * name) {
    ggml_backend_reg_t registry = ggml_backend_reg_by_name("CPU");
    return registry ? reinterpret_cast<F>(ggml_backend_reg_get_proc_address(registry, name)) : nullptr;
}

struct ta_pool {
    ggml_threadpool_t threads = nullptr;

    ~ta_pool() {
        if (threads) {
            auto free_pool = cpu_function<void (*)(ggml_threadpool_t)>("ggml_threadpool_free");
            if (free_pool) {
                free_pool(threads);
            }
        }
    }
};

struct Free {
    void operator()(ggml_context * p) const { ggml_free(p); }
    void operator()(ggml_backend * p) const { ggml_backend_free(p); }
    void operator()(ggml_backend_buffer * p) const { ggml_backend_buffer_free(p); }
    void operator()(ggml_gallocr * p) const { ggml_gallocr_free(p); }
};
template <class T>
using Owned = std::unique_ptr<T, Free>;

// The kinds of buffers with a layout of their own, in the order in which llama.cpp tries them.
inline std::vector<ggml_backend_buffer_type_t> extra_buffer_types(ggml_backend_dev_t device) {
    std::vector<ggml_backend_buffer_type_t> found;
    auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
    for (auto * type = extra ? extra(device) : nullptr; type && *type; ++type) {
        found.push_back(*type);
    }
    return found;
}

// The kind in which llama.cpp lays a matrix like this one out anew; null where it leaves it as it is.
inline ggml_backend_buffer_type_t relaid_buffer_type(ggml_backend_dev_t device, ggml_tensor * w) {
    Owned<ggml_context> context(ggml_init({ggml_tensor_overhead() * 2, nullptr, true}));
    ggml_tensor * x = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, w->ne[0], 32);
    ggml_tensor * y = ggml_mul_mat(context.get(), w, x);
    for (ggml_backend_buffer_type_t buffer_type : extra_buffer_types(device)) {
        Owned<ggml_backend_buffer> empty(ggml_backend_buft_alloc_buffer(buffer_type, 0));
        w->buffer          = empty.get();
        const bool is_done = ggml_backend_dev_supports_op(device, y);
        w->buffer          = nullptr;
        if (is_done) {
            return buffer_type;
        }
    }
    return nullptr;
}
