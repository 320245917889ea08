// Renders prompts as Ollama does: text/template over the values that Ollama hands to a model's TEMPLATE.
// stdin: one JSON object {"template": ..., "requests": [{"messages": [...], "tools": [...]}, ...]}
// stdout: a JSON list of {"text": ...} or {"error": ...}
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"iter"
	"os"
	"strings"
	"text/template"
)

// An object whose keys keep the order of the JSON text.
type properties struct {
	keys   []string
	values map[string]property
}

func (p *properties) UnmarshalJSON(data []byte) error {
	if err := json.Unmarshal(data, &p.values); err != nil {
		return err
	}
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.Token() // {
	for decoder.More() {
		key, err := decoder.Token()
		if err != nil {
			return err
		}
		var skipped json.RawMessage
		if err := decoder.Decode(&skipped); err != nil {
			return err
		}
		p.keys = append(p.keys, key.(string))
	}
	return nil
}

func (p *properties) Len() int {
	if p == nil {
		return 0
	}
	return len(p.keys)
}

func (p *properties) All() iter.Seq2[string, property] {
	return func(yield func(string, property) bool) {
		for i := 0; i < p.Len(); i++ {
			if !yield(p.keys[i], p.values[p.keys[i]]) {
				return
			}
		}
	}
}

// A type is one name or a list of names.
type types []string

func (t *types) UnmarshalJSON(data []byte) error {
	var one string
	if json.Unmarshal(data, &one) == nil {
		*t = types{one}
		return nil
	}
	var many []string
	err := json.Unmarshal(data, &many)
	*t = many
	return err
}

func (t types) String() string { return strings.Join(t, " ") }

type property struct {
	AnyOf       []property
	Type        types
	Items       any
	Description string
	Enum        []any
	Properties  *properties
	Required    []string
}

type parameters struct {
	Type       string
	Defs       any `json:"$defs"`
	Items      any
	Required   []string
	Properties map[string]property
}

type tool struct {
	Type     string
	Function struct {
		Name        string
		Description string
		Parameters  parameters
	}
}

type arguments map[string]any

func (a arguments) String() string {
	text, _ := json.Marshal(map[string]any(a))
	return string(text)
}

type toolCall struct {
	ID       string
	Function struct {
		Index     int
		Name      string
		Arguments arguments
	}
}

type message struct {
	Role       string
	Content    string
	Thinking   string
	ToolCalls  []toolCall `json:"tool_calls"`
	ToolName   string     `json:"tool_name"`
	ToolCallID string     `json:"tool_call_id"`
}

type request struct {
	Messages []*message
	Tools    []tool
}

// Messages of one role in a row become one, except results of tools; the system texts are also joined.
func collate(given []*message) (string, []*message) {
	var system []string
	var out []*message
	for _, m := range given {
		if m.Role == "system" {
			system = append(system, m.Content)
		}
		if n := len(out); n > 0 && out[n-1].Role == m.Role && m.Role != "tool" {
			out[n-1].Content += "\n\n" + m.Content
		} else {
			out = append(out, m)
		}
	}
	return strings.Join(system, "\n\n"), out
}

func main() {
	var input struct {
		Template string
		Requests []request
	}
	if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	asJSON := func(v any) string { text, _ := json.Marshal(v); return string(text) }
	parsed, err := template.New("").Option("missingkey=zero").Funcs(template.FuncMap{"json": asJSON}).Parse(input.Template)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	results := []map[string]string{}
	for _, r := range input.Requests {
		system, messages := collate(r.Messages)
		values := map[string]any{"System": system, "Messages": messages, "Tools": r.Tools, "Response": "",
			"Think": false, "ThinkLevel": "", "IsThinkSet": false}
		var text bytes.Buffer
		if err := parsed.Execute(&text, values); err != nil {
			results = append(results, map[string]string{"error": err.Error()})
		} else {
			results = append(results, map[string]string{"text": text.String()})
		}
	}
	json.NewEncoder(os.Stdout).Encode(results)
}
