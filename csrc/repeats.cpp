// Calls of a steering kernel, kept and made again: what a public op looks at anew in every call, in plain eager code on
// a CPU, takes ten times longer than a kernel on one token. pysteer/ops/prepared.py says when a call is kept.
//
// Tensors are read through the exchange table of DLPack (Tensor.__dlpack_c_exchange_api__), a plain C interface: no
// headers of torch are needed, and a look at a tensor takes a few nanoseconds.

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "packed.h"
#include "registry.h"

namespace py = pybind11;

namespace pysteer {
namespace {

// DLPack 1.x, as far as it is used.
struct View {
    void* data;
    std::int32_t device_type, device_id, ndim;
    std::uint8_t code, bits;
    std::uint16_t lanes;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;

    char* address() const { return static_cast<char*>(data) + byte_offset; }
};

struct Exchange {
    std::uint32_t major, minor;
    void *previous, *allocate, *take, *give;
    int (*look)(void* object, View* view);
    void* stream;
};

constexpr std::int32_t kCpu = 1;
constexpr std::size_t kMostArguments = 48;
constexpr std::size_t kMostEntries = 64;  // a loop over ever new shapes must not grow without end

// The dispatch keys of a thread that are switched on and off (c10::impl::LocalDispatchKeySet): every mode, transform and
// tracer of torch shows there.
struct LocalKeys {
    std::uint64_t included, excluded;
    bool operator==(const LocalKeys& other) const {
        return included == other.included && excluded == other.excluded;
    }
};
using ReadKeys = LocalKeys (*)();

constexpr std::size_t kMostCalm = 8;

// What torch is asked before a call is repeated; given once by `set_surroundings`.
struct Surroundings {
    const Exchange* exchange = nullptr;
    py::object tensor_type, empty_like, grad_enabled, threads;
    py::dict choices;                                      // of backends, emptied when somebody insists on one
    std::vector<std::pair<py::object, py::object>> asked;  // functions, and what they return in plain code
    py::dict level_of;                                     // where forward mode keeps its level
    py::object level_name, level_none;
    ReadKeys read_keys = nullptr;  // null where it is not known
    std::vector<LocalKeys> calm;   // keys under which all questions were answered as in plain code
};

Surroundings* g_surroundings = nullptr;

bool look(PyObject* tensor, View& view) {
    if (g_surroundings->exchange->look(tensor, &view) == 0) return view.device_type == kCpu;
    PyErr_Clear();
    return false;
}

// Borrowed truth of a call without arguments; -1 on error.
int is_true(const py::object& function) {
    PyObject* answer = PyObject_CallNoArgs(function.ptr());
    if (!answer) return -1;
    const int truth = answer == Py_True ? 1 : answer == Py_False ? 0 : PyObject_IsTrue(answer);
    Py_DECREF(answer);
    return truth;
}

// Whether all questions are answered as in plain code. Asking costs more than a small kernel when the code of the
// answers has left the cache.
bool asked_in_vain() {
    for (const auto& [function, usual] : g_surroundings->asked) {
        PyObject* answer = PyObject_CallNoArgs(function.ptr());
        if (!answer) throw py::error_already_set();
        const bool same = answer == usual.ptr() || (PyLong_Check(answer) && PyLong_AsLong(answer) == 0);
        Py_DECREF(answer);
        if (!same) return false;
    }
    return true;
}

// Whether nobody transforms, traces or records what torch does. Keys seen in plain code before answer all questions;
// `learn` asks them anyway and remembers the keys.
bool nobody_watches(bool learn = false) {
    PyObject* level = PyDict_GetItem(g_surroundings->level_of.ptr(), g_surroundings->level_name.ptr());
    if (!level || PyObject_RichCompareBool(level, g_surroundings->level_none.ptr(), Py_EQ) != 1) return false;
    if (!g_surroundings->read_keys) return asked_in_vain();
    auto& calm = g_surroundings->calm;
    const LocalKeys keys = g_surroundings->read_keys();
    const bool known = std::find(calm.begin(), calm.end(), keys) != calm.end();
    if (known && !learn) return true;
    if (!asked_in_vain()) return false;
    if (learn && !known && calm.size() < kMostCalm) calm.push_back(keys);
    return true;
}

bool wants_grad(PyObject* tensor) {
    static PyObject* name = PyUnicode_InternFromString("requires_grad");
    PyObject* answer = PyObject_GetAttr(tensor, name);
    const bool wanted = answer != Py_False;
    Py_XDECREF(answer);
    if (!answer) PyErr_Clear();
    return wanted;
}

std::int64_t threads_of_torch() {
    PyObject* answer = PyObject_CallNoArgs(g_surroundings->threads.ptr());
    if (!answer) throw py::error_already_set();
    const std::int64_t threads = PyLong_AsLongLong(answer);
    Py_DECREF(answer);
    return threads;
}

PyObject* choices_now() {
    static PyObject* name = PyUnicode_InternFromString("cpu");
    return PyDict_GetItem(g_surroundings->choices.ptr(), name);  // borrowed; null after somebody changed them
}

struct Entry {
    std::vector<std::int64_t> layout;  // sizes, then strides
    std::uint8_t code, bits;
    std::int64_t threads, tokens;
    py::object choices;
    const PackedKernel* kernel;
    std::array<Word, kMostArguments> words;

    bool fits(const View& x) const {
        const std::size_t n = x.ndim;
        return layout.size() == 2 * n && code == x.code && bits == x.bits &&
               std::equal(x.shape, x.shape + n, layout.begin()) &&
               std::equal(x.strides, x.strides + n, layout.begin() + n);
    }
};

std::vector<std::int64_t> layout_of(const View& x) {
    std::vector<std::int64_t> layout(x.shape, x.shape + x.ndim);
    layout.insert(layout.end(), x.strides, x.strides + x.ndim);
    return layout;
}

// What is to be known of a call for making it again; null if it cannot be kept.
std::unique_ptr<Entry> entry_of(PyObject* x, const py::capsule& kernel, const py::tuple& arguments) {
    View view;
    PyObject* choices = choices_now();
    const void* packed = PyCapsule_GetPointer(kernel.ptr(), PackedKernel::kCapsule);
    if (!packed) throw py::error_already_set();
    if (!choices || !look(x, view) || !nobody_watches(true)) return nullptr;
    auto entry = std::make_unique<Entry>();
    entry->layout = layout_of(view);
    entry->code = view.code;
    entry->bits = view.bits;
    entry->threads = threads_of_torch();
    entry->choices = py::reinterpret_borrow<py::object>(choices);
    entry->kernel = static_cast<const PackedKernel*>(packed);
    if (entry->kernel->count != arguments.size() || arguments.size() > kMostArguments) return nullptr;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        if (entry->kernel->is_real[i]) {
            entry->words[i].real = arguments[i].cast<double>();
        } else {
            entry->words[i].integer = arguments[i].cast<std::int64_t>();
        }
    }
    return entry;
}

// The entry for such a tensor, if threads and backends are as they were; borrowed.
const Entry* current(const std::vector<std::unique_ptr<Entry>>& entries, const View& x) {
    const auto found = std::find_if(entries.begin(), entries.end(), [&](const auto& each) { return each->fits(x); });
    if (found == entries.end()) return nullptr;
    const bool same = (*found)->choices.ptr() == choices_now() && (*found)->threads == threads_of_torch();
    return same ? found->get() : nullptr;
}

class Repeats {
 public:
    // Banks and other tensors of a table that stay the same objects; channel_dim 1 or -1.
    Repeats(std::vector<py::object> banks, std::int64_t channel_dim)
        : banks_(std::move(banks)), channel_dim_(channel_dim) {}

    // Keeps a call that wrote from x into a fresh tensor; false if it cannot be kept.
    bool keep(py::object x, py::object slot, py::object strength, py::object clock, py::object span, py::capsule kernel,
              py::tuple arguments) {
        if (!g_surroundings) return false;
        const std::array<PyObject*, 4> now{slot.ptr(), strength.ptr(), clock.ptr(), span.ptr()};
        if (!same_table(now.data()) || !same_places()) {
            entries_.clear();
            table_ = {slot, strength, clock, span};
            tensors_ = banks_;
            for (const py::object& each : table_) {
                if (!each.is_none()) tensors_.push_back(each);
            }
            places_.clear();
            for (const py::object& each : tensors_) {
                View view;
                if (!look(each.ptr(), view)) return forget();
                places_.push_back(view.address());
            }
        }
        View view;
        if (!look(x.ptr(), view) || view.ndim < 2 || view.shape[0] == 0) return false;
        auto entry = entry_of(x.ptr(), kernel, arguments);
        if (!entry) return false;
        const std::int64_t channel = channel_dim_ < 0 ? view.ndim - 1 : channel_dim_;
        entry->tokens = 1;
        for (std::int64_t d = 1; d < view.ndim; ++d) entry->tokens *= d == channel ? 1 : view.shape[d];
        if (entries_.size() >= kMostEntries) entries_.clear();
        entries_.insert(entries_.begin(), std::move(entry));
        return true;
    }

    // A new reference, or null without an error if the call is not known. With `rows` the caller vouches for where the
    // tensors of the table lie: a look at each costs more than the kernel when they have left the cache.
    PyObject* again(PyObject* x, PyObject* const* table, PyObject* counts, std::int64_t rows, std::int64_t weight) {
        if (entries_.empty() || reinterpret_cast<PyObject*>(Py_TYPE(x)) != g_surroundings->tensor_type.ptr() ||
            !same_table(table) || !nobody_watches()) {
            return nullptr;
        }
        View from, to;
        if (!look(x, from) || (rows >= 0 && from.shape[0] != rows)) return nullptr;
        const Entry* entry = current(entries_, from);
        if (!entry || (rows < 0 && !same_places()) || graded(x)) return nullptr;
        PyObject* y = PyObject_CallOneArg(g_surroundings->empty_like.ptr(), x);
        if (!y) throw py::error_already_set();
        if (!look(y, to)) return dropped(y);
        std::array<Word, kMostArguments> words = entry->words;
        words[0].integer = reinterpret_cast<std::int64_t>(from.address());
        words[1].integer = reinterpret_cast<std::int64_t>(to.address());
        if (entry->kernel->run(words.data()) != 0) return dropped(y);
        if (counts != Py_None) count(counts, table[2], weight + entry->tokens);
        return y;
    }

    std::size_t size() const { return entries_.size(); }

 private:
    static PyObject* dropped(PyObject* y) {
        Py_DECREF(y);
        return nullptr;
    }

    bool forget() {
        entries_.clear();
        table_ = {};
        tensors_.clear();
        places_.clear();
        return false;
    }

    bool same_table(PyObject* const* now) const {
        for (std::size_t i = 0; i < table_.size(); ++i) {
            if (table_[i].ptr() != now[i]) return false;
        }
        return true;
    }

    bool same_places() const {
        if (places_.size() != tensors_.size()) return false;
        View view;
        for (std::size_t i = 0; i < tensors_.size(); ++i) {
            if (!look(tensors_[i].ptr(), view) || view.address() != places_[i]) return false;
        }
        return true;
    }

    bool graded(PyObject* x) const {
        const int enabled = is_true(g_surroundings->grad_enabled);
        if (enabled < 0) throw py::error_already_set();
        if (enabled == 0) return false;
        return wants_grad(x) || std::any_of(tensors_.begin(), tensors_.end(),
                                            [](const py::object& each) { return wants_grad(each.ptr()); });
    }

    // Under the GIL, so that no two threads add at once.
    static void count(PyObject* counts, PyObject* clock, std::int64_t amount) {
        View sums, now;
        if (!look(counts, sums) || !look(clock, now)) return;
        const std::int64_t step = *reinterpret_cast<const std::int64_t*>(now.address());
        if (step >= 0 && step < sums.shape[0]) reinterpret_cast<std::int64_t*>(sums.address())[step] += amount;
    }

    std::vector<py::object> banks_, tensors_;
    std::array<py::object, 4> table_;
    std::vector<const char*> places_;
    std::vector<std::unique_ptr<Entry>> entries_;
    std::int64_t channel_dim_;
};

// Calls of a kernel that adds what it finds in x to sums that stay where they are.
class Additions {
 public:
    // arguments: of the kernel, beginning with the addresses of x and of the sums. False if the call cannot be kept.
    bool keep(py::object x, py::capsule kernel, py::tuple arguments) {
        auto entry = g_surroundings ? entry_of(x.ptr(), kernel, arguments) : nullptr;
        if (!entry) return false;
        if (entries_.size() >= kMostEntries) entries_.clear();
        entries_.insert(entries_.begin(), std::move(entry));
        return true;
    }

    void forget() { entries_.clear(); }

    bool again(PyObject* x) {
        if (entries_.empty() || reinterpret_cast<PyObject*>(Py_TYPE(x)) != g_surroundings->tensor_type.ptr() ||
            !nobody_watches()) {
            return false;
        }
        View view;
        const Entry* entry = look(x, view) ? current(entries_, view) : nullptr;
        if (!entry) return false;
        std::array<Word, kMostArguments> words = entry->words;
        words[0].integer = reinterpret_cast<std::int64_t>(view.address());
        return entry->kernel->run(words.data()) == 0;
    }

 private:
    std::vector<std::unique_ptr<Entry>> entries_;
};

// again(x), without pybind11 in between.
PyObject* add_again(PyObject* self, PyObject* x) {
    auto* additions = static_cast<Additions*>(PyCapsule_GetPointer(self, nullptr));
    if (!additions) return nullptr;
    try {
        return PyBool_FromLong(additions->again(x));
    } catch (py::error_already_set& error) {
        error.restore();
        return nullptr;
    }
}

PyMethodDef kAddAgain = {"again", &add_again, METH_O, "Whether a call like this one was kept; it is then made."};

// again(x, slot, strength, clock, span, counts, rows, weight), without pybind11 in between.
PyObject* again(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
    if (count != 8) {
        PyErr_SetString(PyExc_TypeError, "again(x, slot, strength, clock, span, counts, rows, weight)");
        return nullptr;
    }
    auto* repeats = static_cast<Repeats*>(PyCapsule_GetPointer(self, nullptr));
    if (!repeats) return nullptr;
    const std::int64_t rows = arguments[6] == Py_None ? -1 : PyLong_AsLongLong(arguments[6]);
    const std::int64_t weight = PyLong_AsLongLong(arguments[7]);
    if (PyErr_Occurred()) return nullptr;
    try {
        PyObject* y = repeats->again(arguments[0], arguments + 1, arguments[5], rows, weight);
        if (y) return y;
        Py_RETURN_NONE;
    } catch (py::error_already_set& error) {
        error.restore();
        return nullptr;
    }
}

PyMethodDef kAgain = {"again", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&again)), METH_FASTCALL,
                      "The result of a call that was kept, or None if there is none like it."};

// A function of one object, which it keeps alive.
template <class T>
py::object function_of(py::object self, PyMethodDef* method) {
    PyObject* holder = PyCapsule_New(self.cast<T*>(), nullptr, [](PyObject* capsule) {
        Py_XDECREF(static_cast<PyObject*>(PyCapsule_GetContext(capsule)));
    });
    if (!holder) throw py::error_already_set();
    PyCapsule_SetContext(holder, self.inc_ref().ptr());
    PyObject* function = PyCFunction_New(method, holder);
    Py_DECREF(holder);
    if (!function) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(function);
}

void set_surroundings(py::capsule exchange, py::object tensor_type, py::object empty_like, py::object grad_enabled,
                      py::object threads, py::dict choices, std::vector<std::pair<py::object, py::object>> asked,
                      py::dict level_of, py::object level_name, py::object level_none, std::uintptr_t read_keys,
                      std::uint64_t included, std::uint64_t excluded) {
    const auto* table = static_cast<const Exchange*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
    if (!table) throw py::error_already_set();
    if (table->major != 1 || !table->look) return;  // of another kind: calls are then not kept
    auto* next = new Surroundings{table,   tensor_type,      empty_like, grad_enabled, threads,
                                  choices, std::move(asked), level_of,   level_name,   level_none,
                                  nullptr, {}};
    if (read_keys) {  // taken only if it says what torch says
        const auto function = reinterpret_cast<ReadKeys>(read_keys);
        if (function() == LocalKeys{included, excluded}) next->read_keys = function;
    }
    g_surroundings = next;  // never freed: a thread may be reading the former one, and there is one for a process
}

void register_repeats(py::module_& m) {
    py::class_<Repeats>(m, "Repeats", "Calls of one steering table that can be made again.")
        .def(py::init<std::vector<py::object>, std::int64_t>())
        .def("keep", &Repeats::keep, "Keeps a call; False if it cannot be kept.")
        .def("__len__", &Repeats::size)
        .def_static("function", [](py::object self) { return function_of<Repeats>(self, &kAgain); },
                    "The function that makes a kept call again.");
    py::class_<Additions>(m, "Additions", "Calls that add to the same sums and can be made again.")
        .def(py::init<>())
        .def("keep", &Additions::keep, "Keeps a call; False if it cannot be kept.")
        .def("forget", &Additions::forget, "Keeps nothing any more.")
        .def_static("function", [](py::object self) { return function_of<Additions>(self, &kAddAgain); },
                    "The function that makes a kept call again, if there is one for its tensor.");
    m.def("set_surroundings", &set_surroundings, "What is asked before a call is made again.");
}

PYSTEER_REGISTER_OP(register_repeats)

}  // namespace
}  // namespace pysteer
