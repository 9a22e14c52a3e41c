// Calls a kernel with arguments that are known by position only.
#pragma once

#include <type_traits>
#include <utility>

#include "fibers.h"

namespace shim {

template <class T>
T argument(void* at) {
    if constexpr (std::is_pointer_v<T>) {
        return (T)at;
    } else {
        return *(std::remove_reference_t<T>*)at;  // a reference or a value: `at` points to the scalar
    }
}

// f(arguments[0], ..., arguments[n - 1], rest...)
template <class... P, size_t... I, class... Rest>
void call(void (*f)(P...), void* const* arguments, std::index_sequence<I...>, Rest... rest) {
    f(argument<std::tuple_element_t<I, std::tuple<P...>>>(arguments[I])..., rest...);
}

template <class... P, class... Rest>
void call_with(void (*f)(P...), void* const* arguments, Rest... rest) {
    call(f, arguments, std::make_index_sequence<sizeof...(P) - sizeof...(Rest)>{}, rest...);
}

}  // namespace shim
