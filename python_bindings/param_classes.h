// Structs of csrc/params.h as Python makes them, by keywords: WalkParams(num_rows=64, num_keys=512, ...). Every field
// is named; a pointer is an address, 0 for null. To the functions of a module, None is a struct of zeros.
//
// Not pybind11's classes, whose constructors look keywords up by their text: a tenth of a step on 64 rows.
// Python's vectorcall hands over a tuple of interned strings, and a field at its own place costs one comparison of
// pointers.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>
#include <vector>

#include "../csrc/params.h"

namespace emc2 {

template <class Value, class Wide>
Value narrowed(Wide wide) {
  const Value value = static_cast<Value>(wide);
  if (static_cast<Wide>(value) != wide && !PyErr_Occurred()) {
    PyErr_SetString(PyExc_OverflowError, "the field has fewer bits than the number");
  }
  return value;
}

// Sets a Python error where it cannot be.
template <class Value>
Value converted(PyObject* value) {
  if constexpr (std::is_pointer_v<Value>) {
    return static_cast<Value>(PyLong_AsVoidPtr(value));
  } else if constexpr (std::is_floating_point_v<Value>) {
    return static_cast<Value>(PyFloat_AsDouble(value));
  } else if constexpr (std::is_unsigned_v<Value>) {
    return narrowed<Value>(PyLong_AsUnsignedLongLong(value));
  } else {
    return narrowed<Value>(PyLong_AsLongLong(value));
  }
}

template <class Struct, auto kMember>
void set_member(Struct& target, PyObject* value) {
  auto& member = target.*kMember;
  member = converted<std::decay_t<decltype(member)>>(value);
}

template <class Struct>
struct Field {
  const char* name;
  void (*set)(Struct&, PyObject*);
  PyObject* interned = nullptr;
};

// The Python class of a struct; it lives as long as the process.
template <class Struct>
class ParamClass {
 public:
  static void add(pybind11::module_& module, const char* name, std::vector<Field<Struct>> fields) {
    fields_ = std::move(fields);
    for (Field<Struct>& field : fields_) field.interned = PyUnicode_InternFromString(field.name);
    const std::string full_name = module.attr("__name__").cast<std::string>() + "." + name;
    PyType_Slot no_slots[] = {{0, nullptr}};
    constexpr unsigned kFlags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION;  // but by vectorcall
    PyType_Spec spec = {full_name.c_str(), sizeof(Instance), 0, kFlags, no_slots};
    type_ = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
    if (!type_) throw pybind11::error_already_set();
    type_->tp_vectorcall = &make;
    module.add_object(name, pybind11::handle(reinterpret_cast<PyObject*>(type_)));
  }

  static const Struct* find(PyObject* object) {
    static const Struct zeros{};
    if (object == Py_None) return &zeros;
    return Py_TYPE(object) == type_ ? &reinterpret_cast<Instance*>(object)->value : nullptr;
  }

 private:
  struct Instance {
    PyObject_HEAD
    Struct value;
  };

  static PyObject* make(PyObject*, PyObject* const* arguments, size_t positional, PyObject* names) {
    const size_t given = names ? static_cast<size_t>(PyTuple_GET_SIZE(names)) : 0;
    if (PyVectorcall_NARGS(positional) != 0 || given != fields_.size()) return refuse();
    PyObject* made = type_->tp_alloc(type_, 0);
    for (size_t i = 0; made && i < given; ++i) {
      const Field<Struct>* field = find_field(PyTuple_GET_ITEM(names, i), i);
      if (field) field->set(reinterpret_cast<Instance*>(made)->value, arguments[i]);
      if (field && !PyErr_Occurred()) continue;
      Py_CLEAR(made);
      if (!field) refuse();
    }
    return made;
  }

  static const Field<Struct>* find_field(PyObject* name, size_t place) {
    if (fields_[place].interned == name) return &fields_[place];
    for (const Field<Struct>& field : fields_) {
      if (PyUnicode_Compare(field.interned, name) == 0) return &field;
    }
    return nullptr;
  }

  static PyObject* refuse() {
    std::string names;
    for (const Field<Struct>& field : fields_) names += std::string(names.empty() ? "" : ", ") + field.name;
    return PyErr_Format(PyExc_TypeError, "%s takes exactly these keywords: %s", type_->tp_name, names.c_str());
  }

  static inline PyTypeObject* type_ = nullptr;
  static inline std::vector<Field<Struct>> fields_;
};

// The shared bases' fields are named through the struct that has them.
#define EMC2_FIELD(Struct, member) {#member, &emc2::set_member<emc2::Struct, &emc2::Struct::member>}
#define EMC2_SCORE_FIELDS(Struct)                                                                      \
  EMC2_FIELD(Struct, num_rows), EMC2_FIELD(Struct, num_keys), EMC2_FIELD(Struct, temperature),         \
      EMC2_FIELD(Struct, temperatures), EMC2_FIELD(Struct, temperature_stride),                        \
      EMC2_FIELD(Struct, query_ids), EMC2_FIELD(Struct, key_ids), EMC2_FIELD(Struct, carried_ids),     \
      EMC2_FIELD(Struct, log_proposal)
#define EMC2_STREAM_FIELDS(Struct)                                                                     \
  EMC2_FIELD(Struct, seed), EMC2_FIELD(Struct, seed_address), EMC2_FIELD(Struct, step),                \
      EMC2_FIELD(Struct, step_address), EMC2_FIELD(Struct, chain_ids)

inline void add_walk_params(pybind11::module_& module) {
  ParamClass<StreamParams>::add(module, "StreamParams", {EMC2_STREAM_FIELDS(StreamParams)});
  ParamClass<Operands>::add(
      module, "Operands",
      {EMC2_FIELD(Operands, queries), EMC2_FIELD(Operands, keys), EMC2_FIELD(Operands, query_stride),
       EMC2_FIELD(Operands, key_stride), EMC2_FIELD(Operands, dim), EMC2_FIELD(Operands, dtype)});
  ParamClass<WalkParams>::add(
      module, "WalkParams",
      {EMC2_SCORE_FIELDS(WalkParams), EMC2_STREAM_FIELDS(WalkParams), EMC2_FIELD(WalkParams, total_proposals),
       EMC2_FIELD(WalkParams, first_proposal), EMC2_FIELD(WalkParams, num_proposals), EMC2_FIELD(WalkParams, burn_in),
       EMC2_FIELD(WalkParams, num_samples), EMC2_FIELD(WalkParams, positions), EMC2_FIELD(WalkParams, position_stride),
       EMC2_FIELD(WalkParams, num_threads)});
  ParamClass<StepInput>::add(
      module, "StepInput",
      {EMC2_FIELD(StepInput, key), EMC2_FIELD(StepInput, score), EMC2_FIELD(StepInput, key_labels)});
  ParamClass<StepOutput>::add(
      module, "StepOutput",
      {EMC2_FIELD(StepOutput, samples), EMC2_FIELD(StepOutput, key), EMC2_FIELD(StepOutput, score),
       EMC2_FIELD(StepOutput, threshold), EMC2_FIELD(StepOutput, accepted), EMC2_FIELD(StepOutput, lse)});
  ParamClass<TransitionOutput>::add(module, "TransitionOutput",
                                    {EMC2_FIELD(TransitionOutput, threshold), EMC2_FIELD(TransitionOutput, score),
                                     EMC2_FIELD(TransitionOutput, position)});
}

template <class Struct>
constexpr bool is_param_struct =
    std::is_same_v<Struct, StreamParams> || std::is_same_v<Struct, Operands> || std::is_same_v<Struct, WalkParams> ||
    std::is_same_v<Struct, StepInput> || std::is_same_v<Struct, StepOutput> ||
    std::is_same_v<Struct, TransitionOutput> || std::is_same_v<Struct, GumbelParams> ||
    std::is_same_v<Struct, IsirParams> || std::is_same_v<Struct, LseParams> ||
    std::is_same_v<Struct, LseGradientParams>;

}  // namespace emc2

namespace pybind11::detail {

template <class Struct>
struct type_caster<Struct, std::enable_if_t<emc2::is_param_struct<Struct>>> {
  static constexpr auto name = const_name("params");
  template <class>
  using cast_op_type = const Struct&;

  bool load(handle source, bool) { return (value_ = emc2::ParamClass<Struct>::find(source.ptr())) != nullptr; }
  operator const Struct&() const { return *value_; }

 private:
  const Struct* value_ = nullptr;
};

}  // namespace pybind11::detail
