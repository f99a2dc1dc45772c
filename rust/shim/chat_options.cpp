// Options from JSON text. What is wrong with them is refused here, as half a sentence: "got …".
//
// llama.cpp makes a grammar of each tool's schema, by recursion and without limits: a list of types
// copies all that hangs on it, and of many optional properties it makes a rule for every rest.
#include "chat_options.h"

#include "guard.h"

#include <memory>
#include <stdexcept>
#include <string>

namespace {

constexpr int    DEEPEST_SCHEMA  = 32;
constexpr double MOST_NODES      = 20'000;
constexpr size_t MOST_PROPERTIES = 128;
constexpr double MOST_REPEATS    = 1999;  // what the grammar's `{m,n}` takes

void check_bounds(const common_json & schema, const char * low, const char * high) {
    const bool has_low = schema.contains(low) && schema.at(low).is_number();
    if (!has_low) return;
    const double least = schema.at(low).get<double>();
    if (std::string(low) != "minimum" && least > MOST_REPEATS) {
        throw std::invalid_argument(std::string("a schema whose `") + low + "` is more than 1999");
    }
    if (schema.contains(high) && schema.at(high).is_number() && least > schema.at(high).get<double>()) {
        throw std::invalid_argument(std::string("a schema whose `") + low + "` is more than its `" + high + "`");
    }
}

// Checks a schema, and counts the nodes that llama.cpp makes of it.
double nodes_of(const common_json & schema, int depth) {
    if (depth > DEEPEST_SCHEMA) throw std::invalid_argument("a schema that is nested more than 32 deep");
    double copies = 1, nodes = 1;
    if (schema.is_object()) {
        check_bounds(schema, "minLength", "maxLength");
        check_bounds(schema, "minItems", "maxItems");
        check_bounds(schema, "minimum", "maximum");
        if (schema.contains("type") && schema.at("type").is_array()) copies = double(schema.at("type").size());
        if (schema.contains("properties") && schema.at("properties").size() > MOST_PROPERTIES) {
            throw std::invalid_argument("a schema of more than 128 properties");
        }
    }
    if (schema.is_object() || schema.is_array()) {
        for (auto child = schema.begin(); child != schema.end(); ++child) {
            nodes += nodes_of(child.value(), depth + 1);
        }
    }
    if (copies * nodes > MOST_NODES) throw std::invalid_argument("a schema that is too large");
    return copies * nodes;
}

void check_tools(const common_json & tools) {
    if (!tools.is_array()) throw std::invalid_argument("something else than a list");
    double nodes = 0;
    for (const auto & tool : tools) {
        if (!tool.is_object() || !tool.contains("function") || !tool.at("function").is_object()) {
            throw std::invalid_argument("something that is no function");
        }
        const common_json & function = tool.at("function");
        if (!function.contains("name") || !function.at("name").is_string()) {
            throw std::invalid_argument("a function without a name");
        }
        if (function.contains("parameters")) nodes += nodes_of(function.at("parameters"), 0);
    }
    if (nodes > MOST_NODES) throw std::invalid_argument("schemas that are too large together");
}

bool truth(const std::string & name, const common_json & value) {
    if (!value.is_boolean()) throw std::invalid_argument("`" + name + "`, which is neither true nor false");
    return value.get<bool>();
}

std::string word(const std::string & name, const common_json & value) {
    if (!value.is_string()) throw std::invalid_argument("`" + name + "`, which is no text");
    return value.get<std::string>();
}

void set(ta_chat_options & options, const std::string & name, const common_json & value) {
    if (value.is_null()) return;
    if (name == "tools") {
        check_tools(value);
        options.tools = common_chat_tools_parse_oaicompat(value);
    } else if (name == "tool_choice") {
        options.tool_choice = common_chat_tool_choice_parse_oaicompat(word(name, value));
    } else if (name == "parallel_tool_calls") {
        options.parallel_tool_calls = truth(name, value);
    } else if (name == "enable_thinking") {
        options.enable_thinking = truth(name, value);
    } else if (name == "reasoning_format") {
        options.reasoning_format = common_reasoning_format_from_name(word(name, value));
    } else if (name == "chat_template_kwargs") {
        if (!value.is_object()) throw std::invalid_argument("`chat_template_kwargs`, which is no object");
        options.kwargs = value;
    } else if (name == "continue_final_message") {
        options.continue_final_message = truth(name, value);
    } else {
        throw std::invalid_argument("`" + name + "`");
    }
}

}  // namespace

int ta_chat_options_new(const char * json, size_t length, ta_chat_options ** out, ta_error * error) noexcept {
    return ta_guard(error, [&] {
        auto options = std::make_unique<ta_chat_options>();
        try {
            const auto given = common_json::parse(std::string(json, length));
            if (!given.is_object()) throw std::invalid_argument("something else than an object");
            for (auto option = given.begin(); option != given.end(); ++option) {
                set(*options, option.key(), option.value());
            }
        } catch (const std::bad_alloc &) {
            throw;
        } catch (const std::exception & thrown) {
            return ta_fail(error, TA_REFUSED, thrown.what());
        }
        // Given as one of the template's own names it means the same.
        if (options->kwargs.contains("enable_thinking") && options->kwargs.at("enable_thinking").is_boolean()) {
            options->enable_thinking = options->kwargs.at("enable_thinking").get<bool>();
        }
        *out = options.release();
        return int(TA_OK);
    });
}

void ta_chat_options_free(ta_chat_options * options) noexcept { delete options; }

bool ta_chat_options_have_tools(const ta_chat_options * options) noexcept { return !options->tools.empty(); }
