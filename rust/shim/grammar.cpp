// For tests of our grammars: what llama.cpp's own says of a text.
#include "guard.h"

#include "src/llama-grammar.h"

#include <memory>
#include <stdexcept>

namespace {

struct Free {
    void operator()(llama_grammar * p) const { llama_grammar_free_impl(p); }
};

int verdict_of(llama_grammar * grammar, const char * text) {
    if (!grammar) {
        return TA_GRAMMAR_REFUSED;
    }
    if (*text) {
        try {
            llama_grammar_accept_str(*grammar, text);
        } catch (const std::runtime_error &) {
            return TA_GRAMMAR_NO_MATCH;
        }
    }
    for (const auto & stack : llama_grammar_get_stacks(grammar)) {
        if (stack.empty()) {
            return TA_GRAMMAR_MATCHES;
        }
    }
    return TA_GRAMMAR_BEGINS;
}

}  // namespace

int ta_grammar_try(const char * grammar, const char * text, int * verdict, ta_error * error) noexcept {
    return ta_guard(error, [&] {
        std::unique_ptr<llama_grammar, Free> parsed(
            llama_grammar_init_impl(nullptr, grammar, "root", false, nullptr, 0, nullptr, 0));
        *verdict = verdict_of(parsed.get(), text);
        return int(TA_OK);
    });
}
