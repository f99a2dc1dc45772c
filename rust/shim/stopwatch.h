// Times graphs on the CPU, as if llama.cpp computed them in the midst of a model.
#pragma once

#include "cpu.h"
#include "guard.h"

#include <chrono>
#include <cstdint>

// Between two looks at a layer llama.cpp reads all the others, so it is never found in the processor's
// caches. What is timed lies in a ring, and each time further on.
constexpr size_t RING_BYTES = 64 << 20;

// The threads stay awake from one look to the next, as they do from step to step: waking them up
// takes longer than a single row does, which is also looked at in several layers.
constexpr uint32_t POLL              = 50;
constexpr int      LAYERS_OF_ONE_ROW = 4;

// A small number in each of f32, f16 and bf16, and a sound block of every quantised type. How long a
// product takes does not depend on it.
constexpr uint8_t BYTE_OF_ALL_NUMBERS = 0x3c;

struct Stopwatch {
    // The backend computes on the pool, and goes before it.
    std::unique_ptr<ta_pool> pool;
    Owned<ggml_backend>      backend;
    Owned<ggml_gallocr>      allocator;

    int start(int32_t n_threads, ta_error * error) {
        ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        backend.reset(device ? ggml_backend_dev_init(device, nullptr) : nullptr);
        auto set_threads = cpu_function<void (*)(ggml_backend_t, int)>("ggml_backend_set_n_threads");
        auto set_pool = cpu_function<void (*)(ggml_backend_t, ggml_threadpool_t)>("ggml_backend_cpu_set_threadpool");
        if (!backend || !set_threads || !set_pool) {
            return ta_fail(error, TA_REFUSED, "there is no CPU backend");
        }
        set_threads(backend.get(), n_threads);
        if (n_threads > 1) {
            ta_pool * made = nullptr;
            if (const int status = ta_pool_new(n_threads, POLL, &made, error)) {
                return status;
            }
            pool.reset(made);
            set_pool(backend.get(), pool->threads);
        }
        allocator.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend.get())));
        return TA_OK;
    }

    // `fill` gives the inputs their numbers, once they have a place.
    template <class F>
    int time(ggml_cgraph * graph, double * seconds, ta_error * error, F && fill) {
        if (!ggml_gallocr_alloc_graph(allocator.get(), graph)) {
            return ta_fail(error, TA_NO_MEMORY, "");
        }
        fill();
        const auto begun = std::chrono::steady_clock::now();
        if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) {
            return ta_fail(error, TA_REFUSED, "what is to be timed could not be computed");
        }
        *seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
        return TA_OK;
    }
};
