//! JSON schemas before they are compiled: their size, and what no answer could ever satisfy.

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// Of schemas in one another; each takes two levels of JSON.
const DEEPEST: usize = 32;
/// Every one that must be there, or may, has a place in the grammar.
const MOST_ITEMS: f64 = 10_000.0;
const MOST_CHARACTERS: f64 = 1_000_000.0;

/// Spaces between the parts of an answer, as llama.cpp allows them: without a limit small models write
/// them until their tokens are used up.
const SPACE: &str = r" |\n{1,2}[ \t]{0,20}";

/// The schema of a text, if it is one that can be compiled.
pub fn parse(text: &str) -> Result<Value> {
    let mut schema: Value = serde_json::from_str(text).map_err(|error| {
        let position = Some((error.line(), error.column())).filter(|(line, _)| *line > 0);
        let said = error.to_string();
        let what = said.split(" at line ").next().unwrap_or(&said);
        Error::grammar("json_schema", format!("it is not JSON: {what}"), position)
    })?;
    check(&schema, "#", 0)?;
    if schema == Value::Bool(true) {
        schema = json!({});
    }
    if let Value::Object(fields) = &mut schema {
        fields.entry("x-guidance").or_insert_with(|| json!({ "whitespace_pattern": SPACE }));
    }
    Ok(schema)
}

fn check(schema: &Value, path: &str, depth: usize) -> Result<()> {
    let fields = match schema {
        Value::Object(fields) => fields,
        Value::Bool(_) => return Ok(()),
        _ => return refuse(path, "a schema is an object, true or false"),
    };
    if depth > DEEPEST {
        return refuse(path, &format!("more than {DEEPEST} schemas lie in one another"));
    }
    check_limits(fields, path)?;
    check_reference(fields, path)?;
    for (name, value) in fields {
        let inside = || format!("{path}/{name}");
        match (name.as_str(), value) {
            ("enum", Value::Array(choices)) if choices.is_empty() => {
                return refuse(path, "`enum` has no values");
            }
            (
                "properties" | "patternProperties" | "$defs" | "definitions" | "dependentSchemas",
                Value::Object(schemas),
            ) => {
                for (name, schema) in schemas {
                    check(schema, &format!("{}/{name}", inside()), depth + 1)?;
                }
            }
            ("allOf" | "anyOf" | "oneOf" | "prefixItems" | "items", Value::Array(schemas)) => {
                for (index, schema) in schemas.iter().enumerate() {
                    check(schema, &format!("{}/{index}", inside()), depth + 1)?;
                }
            }
            (
                "items"
                | "additionalItems"
                | "additionalProperties"
                | "contains"
                | "propertyNames"
                | "not"
                | "if"
                | "then"
                | "else"
                | "unevaluatedItems"
                | "unevaluatedProperties",
                schema,
            ) => check(schema, &inside(), depth + 1)?,
            _ => {}
        }
    }
    Ok(())
}

fn check_limits(fields: &Map<String, Value>, path: &str) -> Result<()> {
    let number = |name: &str| fields.get(name).and_then(Value::as_f64);
    for (low, high) in [
        ("minLength", "maxLength"),
        ("minItems", "maxItems"),
        ("minProperties", "maxProperties"),
        ("minContains", "maxContains"),
        ("minimum", "maximum"),
    ] {
        if let (Some(least), Some(most)) = (number(low), number(high))
            && least > most
        {
            return refuse(path, &format!("`{low}` {least} is more than `{high}` {most}"));
        }
    }
    for (name, most) in [
        ("minLength", MOST_CHARACTERS),
        ("maxLength", MOST_CHARACTERS),
        ("minItems", MOST_ITEMS),
        ("maxItems", MOST_ITEMS),
        ("minProperties", MOST_ITEMS),
        ("maxProperties", MOST_ITEMS),
    ] {
        if let Some(value) = number(name).filter(|value| *value > most) {
            return refuse(path, &format!("`{name}` {value} is more than {most}"));
        }
    }
    Ok(())
}

/// Nothing is fetched from anywhere.
fn check_reference(fields: &Map<String, Value>, path: &str) -> Result<()> {
    match fields.get("$ref").and_then(Value::as_str) {
        Some(reference) if !reference.starts_with('#') => {
            let shown: String = reference.chars().take(100).collect();
            refuse(path, &format!("`$ref` `{shown}` is not a part of this schema (`#/…`)"))
        }
        _ => Ok(()),
    }
}

fn refuse<T>(path: &str, what: &str) -> Result<T> {
    let shown: String = path.chars().take(200).collect();
    Err(Error::grammar("json_schema", format!("at `{shown}`: {what}"), None))
}
