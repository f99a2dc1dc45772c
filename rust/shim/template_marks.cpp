#include "template_marks.h"

namespace {

using jinja::value;

bool has_input(const value & v) {
    for (const auto & part : v->val_str.parts) {
        if (part.is_input) return true;
    }
    for (const value & item : v->val_arr) {
        if (has_input(item)) return true;
    }
    for (const auto & [key, item] : v->val_obj) {
        if (has_input(key) || has_input(item)) return true;
    }
    return false;
}

// The same text as the engine's, put together from the parts.
value joined(const value & list, const std::vector<value> & arguments, const value & result) {
    auto text = jinja::mk_val<jinja::value_string>();
    const bool has_delimiter = !arguments.empty() && is_text(arguments[0]);
    for (size_t i = 0; i < list->val_arr.size(); ++i) {
        if (i > 0 && has_delimiter) text->val_str.append(arguments[0]->val_str);
        const value & item = list->val_arr[i];
        if (!is_container(item) && !item->is_undefined()) text->val_str.append(item->as_string());
    }
    if (text->val_str.str() == result->val_str.str()) return text;
    mark(result, has_input(list));  // of an attribute of each
    return result;
}

}  // namespace

bool is_text(const value & v) { return jinja::is_val<jinja::value_string>(v); }

bool is_container(const value & v) {
    return jinja::is_val<jinja::value_array>(v) || jinja::is_val<jinja::value_object>(v);
}

void mark(const value & v, bool is_input) {
    for (auto & part : v->val_str.parts) part.is_input = is_input;
    for (const value & item : v->val_arr) mark(item, is_input);
    for (const auto & [key, item] : v->val_obj) {
        mark(key, is_input);
        mark(item, is_input);
    }
}

value marked(const std::string & builtin, const value & input, const std::vector<value> & arguments,
             const value & result) {
    if (builtin == "tojson" || (is_container(input) && (builtin == "string" || builtin == "safe"))) {
        mark(result, has_input(input));
    } else if (builtin == "join" && is_container(input)) {
        return joined(input, arguments, result);
    } else if ((builtin == "split" || builtin == "rsplit") && is_text(input)) {
        const auto & text = input->val_str;
        if (!text.parts.empty() && text.all_parts_are_input()) mark(result, true);
    }
    return result;
}
