// For tests of our sampler: llama.cpp's own samplers on rows of logits, and what they leave.
#include "guard.h"

#include "llama.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct Free {
    void operator()(llama_sampler * p) const { llama_sampler_free(p); }
};
using Chain = std::unique_ptr<llama_sampler, Free>;

llama_sampler * make(const llama_vocab * vocab, int32_t n_vocab, const ta_sampler & with) {
    const std::string name   = with.name;
    const float *     values = with.values;
    const auto        whole  = [&](int at) { return static_cast<int32_t>(values[at]); };
    if (name == "logit_bias") {
        const llama_logit_bias biases[] = { { whole(0), values[1] }, { whole(2), values[3] } };
        return llama_sampler_init_logit_bias(n_vocab, 2, biases);
    }
    if (name == "penalties") {
        return llama_sampler_init_penalties(n_vocab, whole(0), values[1], values[2], values[3]);
    }
    if (name == "dry") {
        std::vector<const char *> breakers(with.strings, with.strings + with.n_strings);
        return llama_sampler_init_dry(vocab, values[0], values[1], whole(2), whole(3), breakers.data(), breakers.size());
    }
    if (name == "top_n_sigma") {
        return llama_sampler_init_top_n_sigma(values[0]);
    }
    if (name == "top_k") {
        return llama_sampler_init_top_k(whole(0));
    }
    if (name == "typical") {
        return llama_sampler_init_typical(values[0], 0);
    }
    if (name == "top_p") {
        return llama_sampler_init_top_p(values[0], 0);
    }
    if (name == "min_p") {
        return llama_sampler_init_min_p(values[0], 0);
    }
    if (name == "xtc") {
        return llama_sampler_init_xtc(values[0], values[1], 0, 1);
    }
    if (name == "temp") {
        return llama_sampler_init_temp(values[0]);
    }
    if (name == "temp_ext") {
        return llama_sampler_init_temp_ext(values[0], values[1], values[2]);
    }
    if (name == "mirostat") {
        return llama_sampler_init_mirostat(n_vocab, 1, values[0], values[1], 100);
    }
    if (name == "mirostat_v2") {
        return llama_sampler_init_mirostat_v2(1, values[0], values[1]);
    }
    throw std::invalid_argument("no sampler is called " + name);
}

std::vector<llama_token_data> candidates_of(const float * row, int32_t n_vocab) {
    std::vector<llama_token_data> candidates;
    for (llama_token token = 0; token < n_vocab; ++token) {
        candidates.push_back({ token, row[token], 0.0f });
    }
    return candidates;
}

}  // namespace

int ta_samplers_apply(const llama_vocab * vocab, const ta_sampler * samplers, int32_t n_samplers,
                      const int32_t * history, int32_t n_history, const float * rows, int32_t n_rows,
                      int32_t n_vocab, int32_t * tokens, double * probabilities, int32_t * n_left,
                      ta_error * error) noexcept {
    return ta_guard(error, [&] {
        Chain chain(llama_sampler_chain_init(llama_sampler_chain_default_params()));
        for (int32_t i = 0; i < n_samplers; ++i) {
            llama_sampler_chain_add(chain.get(), make(vocab, n_vocab, samplers[i]));
        }
        for (int32_t i = 0; i < n_history; ++i) {
            llama_sampler_accept(chain.get(), history[i]);
        }
        std::vector<llama_token_data> candidates;
        llama_token_data_array        left = {};
        for (int32_t row = 0; row < n_rows; ++row) {
            candidates = candidates_of(rows + size_t(row) * n_vocab, n_vocab);
            left       = { candidates.data(), candidates.size(), -1, false };
            llama_sampler_apply(chain.get(), &left);
        }
        double best = -INFINITY, total = 0.0;
        for (size_t i = 0; i < left.size; ++i) {
            best = std::max(best, double(left.data[i].logit));
        }
        for (size_t i = 0; i < left.size; ++i) {
            tokens[i]        = left.data[i].id;
            probabilities[i] = std::exp(left.data[i].logit - best);
            total += probabilities[i];
        }
        for (size_t i = 0; i < left.size; ++i) {
            probabilities[i] /= total;
        }
        *n_left = static_cast<int32_t>(left.size);
        return int(TA_OK);
    });
}
