// ggml's CPU backend, which is a module chosen at run time: its functions are found by name.
#pragma once

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <memory>
#include <stdexcept>

template <class F>
F cpu_function(const char * name) {
    ggml_backend_reg_t registry = ggml_backend_reg_by_name("CPU");
    return registry ? reinterpret_cast<F>(ggml_backend_reg_get_proc_address(registry, name)) : nullptr;
}

inline ggml_threadpool_t new_pool(int n_threads, uint32_t poll) {
    auto make = cpu_function<ggml_threadpool_t (*)(ggml_threadpool_params *)>("ggml_threadpool_new");
    if (!make) {
        throw std::runtime_error("the CPU backend offers no thread pool");
    }
    ggml_threadpool_params params;
    ggml_threadpool_params_init(&params, n_threads);
    params.poll = poll;
    return make(&params);
}

inline void free_pool(ggml_threadpool_t pool) {
    auto free = cpu_function<void (*)(ggml_threadpool_t)>("ggml_threadpool_free");
    if (pool && free) {
        free(pool);
    }
}

struct Free {
    void operator()(ggml_context * p) const { ggml_free(p); }
    void operator()(ggml_backend * p) const { ggml_backend_free(p); }
    void operator()(ggml_backend_buffer * p) const { ggml_backend_buffer_free(p); }
    void operator()(ggml_gallocr * p) const { ggml_gallocr_free(p); }
    void operator()(ggml_threadpool * p) const { free_pool(p); }
};
template <class T>
using Owned = std::unique_ptr<T, Free>;
